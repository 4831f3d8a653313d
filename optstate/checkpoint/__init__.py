"""Checkpoint files: the safetensors container, the writer, optstate's own document, saving and loading.

Importing this package does not import torch: a tool that only looks into a file starts at once.
"""

from optstate.checkpoint.errors import CheckpointError

__all__ = ["CheckpointError"]

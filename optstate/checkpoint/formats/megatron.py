"""What Megatron-LM's distributed optimizer writes: recognised, and refused in words. Imports no torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from optstate.checkpoint.errors import CheckpointError

__all__ = ["has_its_keys", "is_megatron", "refused"]

# Flat buffers by data-parallel group, or a tensor per statistic that has all layers of the model in it.
_KEY = re.compile(r"distributed\.dp_group_idx_\d|(^|\.)optimizer\.state\.(exp_avg|exp_avg_sq|fp32_param|param)\.")


def is_megatron(path: str | os.PathLike[str]) -> bool:
    """Whether a folder has a distrib_optim.pt, or a folder mp_rank_* in it does."""
    folder = Path(path)
    places = [folder, *folder.glob("mp_rank_*")] if folder.is_dir() else []
    return any((place / "distrib_optim.pt").is_file() for place in places)


def has_its_keys(keys: Iterable[str]) -> bool:
    """Whether tensors of torch.distributed.checkpoint are named as Megatron names its own."""
    return any(_KEY.search(key) for key in keys)


def refused(path: str | os.PathLike[str]) -> CheckpointError:
    """Why such a folder is not read."""
    reason = "state of Megatron-LM's distributed optimizer: which parameter has which part of it, only Megatron knows"
    hint = "load it with Megatron-LM, and save each parameter's state by its name"
    return CheckpointError(path, reason, hint, refused=True)

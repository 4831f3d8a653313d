"""Checkpoints: documents, files, formats, operations, and running optimizers."""

"""What training needs in bytes: measured here, estimated before training."""

from optstate.memory.measure import peak_extra_bytes

__all__ = ["peak_extra_bytes"]

"""The memory that training needs: measured as it runs, or estimated before training."""

from optstate.memory.measure import peak_extra_bytes

__all__ = ["peak_extra_bytes"]

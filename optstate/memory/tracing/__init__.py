"""One training step on tensors without values, and what is alive at each moment of it."""

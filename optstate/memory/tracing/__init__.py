"""Tracing: one training step on tensors without values, and the memory alive at each of its moments."""

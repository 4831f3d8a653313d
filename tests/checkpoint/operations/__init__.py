"""Tests of `checkpoint/operations`."""

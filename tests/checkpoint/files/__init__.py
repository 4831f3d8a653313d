"""Tests of `checkpoint/files`."""

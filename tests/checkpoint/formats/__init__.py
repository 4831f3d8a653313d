"""Tests of `checkpoint/formats`."""

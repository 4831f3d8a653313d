"""Tests of `checkpoint/live`."""

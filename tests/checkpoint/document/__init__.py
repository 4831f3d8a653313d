"""Tests of `checkpoint/document`."""

"""Tests of `distributed`."""

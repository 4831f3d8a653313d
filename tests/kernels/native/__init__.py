"""Tests of the steps compiled from C."""

"""Helpers of the tests: models, processes, files, attacks."""

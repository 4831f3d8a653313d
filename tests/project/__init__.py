"""Tests of the project as a whole: package, documents, examples, benchmarks."""

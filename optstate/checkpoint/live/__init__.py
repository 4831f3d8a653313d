"""A running optimizer, saved and loaded, on one device or many."""

"""Several devices: where the parts of parameters and state lie, how sums go over them, and what must be the same."""

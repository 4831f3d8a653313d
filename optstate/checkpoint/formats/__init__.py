"""Other libraries' optimizer state and optstate's own, read and written. Imports no torch."""

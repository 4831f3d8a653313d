"""What the formats of all libraries share: a state_dict taken apart, and one put together. Imports no torch."""

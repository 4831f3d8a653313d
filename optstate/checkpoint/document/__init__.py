"""What a checkpoint says: one data model, and its JSON. Imports no torch."""

"""Other people's engines and trainers: which of them the library works under, and which would be wrong."""

"""Other people's engines and trainers: recognise those under which an update would be wrong, and refuse them."""

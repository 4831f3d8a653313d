"""What a package adds to optstate: a store (`store.py`) and a format of checkpoints (`trainer_files.py`)."""

"""What is done with checkpoints: summarize, check, compare, convert. Documents go in, documents or reports come out."""

"""What training needs in bytes: measured here, estimated before training."""

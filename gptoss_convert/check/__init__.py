"""What a checkpoint is, and whether it is what its manifest says."""

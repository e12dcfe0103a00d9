"""A running server as a witness: what it answers, and how far that is from the model's answers."""

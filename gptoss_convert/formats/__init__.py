"""Checkpoint formats: how each is recognised, opened and laid out, and what lies beside weights."""

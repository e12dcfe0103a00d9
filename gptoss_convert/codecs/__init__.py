"""Encodings of expert weights: how values become stored bytes and come back."""

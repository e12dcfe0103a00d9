"""Synthetic checkpoints: published names, shapes and files, made-up values."""

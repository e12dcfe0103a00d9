"""Conversions: planned, run, gone on with where they were stopped, and published all at once."""

"""Conversions: planned, run, resumed after an interruption, and published all at once."""

"""Codecs: encodings of a weight other than as BF16 values, each in a folder of its own."""

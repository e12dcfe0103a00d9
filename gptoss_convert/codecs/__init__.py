"""Codecs: how a weight is stored otherwise than as BF16 values; each in a folder of its own."""

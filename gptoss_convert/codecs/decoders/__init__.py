"""Decoders: encodings that other tools write and that are read only, tensor by tensor."""

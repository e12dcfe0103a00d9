"""Megatron's torch_dist checkpoints: its fields, its state beside the tensors, how to launch it."""

from gptoss_convert.formats.megatron.format import FORMAT

__all__ = ["FORMAT"]

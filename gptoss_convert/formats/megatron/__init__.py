"""Megatron's torch_dist checkpoints: its fields, its state beside the tensors, how to launch it."""

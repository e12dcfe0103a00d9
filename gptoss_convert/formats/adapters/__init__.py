"""Adapters: what each LoRA dialect stores, read into one normal form of updates to parameters."""

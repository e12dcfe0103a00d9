"""Checkpoints that other tools quantised, decoded tensor by tensor as they are read."""

from __future__ import annotations

from gptoss_convert.formats.quantised.tensors import Quantised, decoded, methods, why_not

__all__ = ["Quantised", "decoded", "methods", "why_not"]

"""Activations rounded through an 8-bit float, as some engines do, and GPT-OSS does not."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptoss_convert.witness.fp4 import BLOCK


def rounded(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`x` through `dtype`, each 32 values with a power of two as scale (OCP MX 1.0); None: `x`.

    The largest value of a block lands in the highest octave of `dtype`, beyond it saturates.
    """
    if dtype is None:
        return x
    largest = torch.finfo(dtype).max
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    octave = torch.frexp(blocks.abs().amax(-1, keepdim=True)).exponent - 1
    scale = torch.ldexp(torch.ones_like(blocks[..., :1]), octave - math.floor(math.log2(largest)))
    return ((blocks / scale).clamp(-largest, largest).to(dtype).float() * scale).flatten(-2).to(x)

"""MXFP4 as torch decodes it on any device: an implementation of its own, for verification only."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gptoss_convert.errors import CodecError

BLOCK = 32
"""Values that share one scale (OCP MX 1.0)."""
MAX_SCALE = 252
"""Largest E8M0 byte at which all E2M1 codes are finite in BF16."""
MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""E2M1 without its sign bit, by code 0..7; code bit 3 is the sign."""


@dataclass(frozen=True, slots=True)
class Packed:
    """Matrices in MXFP4: `blocks` u8 `[..., K/32, 16]`, low nibble first, and `scales` u8."""

    blocks: Tensor
    scales: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the values."""
        *rows, blocks = self.scales.shape
        return torch.Size((*rows, blocks * BLOCK))

    def __getitem__(self, index: int | slice | tuple[slice, ...]) -> Packed:
        """The same rows of blocks and scales."""
        return Packed(self.blocks[index], self.scales[index])

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Values `[..., K]`, exact in bfloat16 and float32 for the scales `checked` accepts."""
        device = self.blocks.device
        pairs = _byte_values(device)[self.blocks.int()]
        factor = _scale_values(device)[self.scales.int()]
        values = pairs.flatten(-2) * factor.unsqueeze(-1)
        return values.flatten(-2).to(dtype)


def checked(packed: Packed, tensor: str) -> Packed:
    """Return `packed`, or raise CodecError naming `tensor` if its shapes or scales are invalid."""
    blocks, scales = packed.blocks, packed.scales
    if blocks.dtype != torch.uint8 or scales.dtype != torch.uint8:
        raise CodecError(
            f"{tensor}: expects blocks and scales of U8, found {blocks.dtype} and {scales.dtype}"
        )
    if blocks.shape != (*scales.shape, BLOCK // 2):
        raise CodecError(
            f"{tensor}: expects 16 bytes per scale, found blocks {tuple(blocks.shape)} and scales "
            f"{tuple(scales.shape)}"
        )
    largest = int(scales.max())
    if largest > MAX_SCALE:
        raise CodecError(f"{tensor}: expects scales up to {MAX_SCALE}, found {largest}")
    return packed


@cache
def _byte_values(device: torch.device) -> Tensor:
    """Both values of each byte, float32 `[256, 2]`: the low nibble comes first."""
    signed = MAGNITUDES + tuple(-m for m in MAGNITUDES)
    pairs = [(signed[byte & 15], signed[byte >> 4]) for byte in range(256)]
    return torch.tensor(pairs, dtype=torch.float32, device=device)


@cache
def _scale_values(device: torch.device) -> Tensor:
    """2^(byte - 127), float32 `[256]`; exact, subnormal at 0. 255 is NaN (OCP MX 1.0, 5.4)."""
    powers = [2.0 ** (byte - 127) for byte in range(255)]
    return torch.tensor([*powers, float("nan")], dtype=torch.float32, device=device)

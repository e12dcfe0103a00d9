"""MXFP4 as torch decodes it on any device: an implementation of its own, for verification only."""

from __future__ import annotations

import math
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


_AT_ONCE = 1 << 25
"""Bytes of blocks that are decoded at once, in some passes over memory."""


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
        values = torch.empty(self.shape, dtype=dtype, device=self.blocks.device)
        pairs, factors = _tables(self.blocks.device, dtype)
        blocks, scales = self.blocks.flatten(0, -3), self.scales.flatten(0, -2)
        rows = max(1, _AT_ONCE // max(1, blocks[0].numel())) if len(blocks) else 1
        parts = (one.split(rows) for one in (values.view(*blocks.shape[:2], BLOCK), blocks, scales))
        for out, codes, exponents in zip(*parts, strict=True):
            # Both values of a byte are one word of the table.
            out.copy_(pairs[codes.int()].view(dtype)).mul_(factors[exponents.int()].unsqueeze(-1))
        return values


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
def _tables(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Both values of each byte, low nibble first, as one word `[256]`; 2^(byte - 127) `[256]`.

    The factors are exact, subnormal at 0; 255 is NaN (OCP MX 1.0, 5.4).
    """
    signed = MAGNITUDES + tuple(-m for m in MAGNITUDES)
    values = [(signed[byte & 15], signed[byte >> 4]) for byte in range(256)]
    pairs = torch.tensor(values, dtype=torch.float32).to(dtype)
    powers = torch.tensor([*(2.0 ** (byte - 127) for byte in range(255)), math.nan])
    word = torch.int32 if dtype.itemsize == 2 else torch.int64
    return pairs.view(word).flatten().to(device), powers.to(dtype).to(device)

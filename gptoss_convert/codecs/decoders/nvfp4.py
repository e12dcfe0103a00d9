"""NVFP4: E2M1 codes, one E4M3 scale for 16 of them, one float32 scale for all.

Two tools, two arithmetics, both bit for bit: ModelOpt multiplies the scales and packs experts along
the second to last axis (`NVFP4QTensor.dequantize`), compressed-tensors divides by the global scale
and packs along the last (`compressors/nvfp4`). Blocks never cross a row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from gptoss_convert.codecs.decoders.decoder import Member, Stored, require
from gptoss_convert.errors import InputError

if TYPE_CHECKING:
    from gptoss_convert.codecs.decoders.decoder import Read, Values

BLOCK = 16


class Nvfp4:
    """`codes`, two a byte, low nibble first, `scales`, and `global`: one, or one per matrix."""

    dtypes: Mapping[str, frozenset[str]] = MappingProxyType(
        {
            "codes": frozenset({"U8"}),
            "scales": frozenset({"F8_E4M3"}),
            "global": frozenset({"F32"}),
        }
    )

    def shape(self, members: Mapping[str, Member], numbers: Mapping[str, float]) -> tuple[int, ...]:
        stored = members["codes"].shape
        axis = len(stored) - (2 if numbers["second_to_last"] else 1)
        if axis < 0 or stored[axis] * 2 % BLOCK:
            raise InputError(f"codes have shape {stored}: no whole blocks of {BLOCK} values")
        shape = (*stored[:axis], stored[axis] * 2, *stored[axis + 1 :])
        scales = (*stored[:axis], stored[axis] * 2 // BLOCK, *stored[axis + 1 :])
        require({"scales": scales}, members)
        matrices = shape[:-2] if math.prod(members["global"].shape) > 1 else ()
        require({"global": matrices}, members)
        return shape

    def decode(self, stored: Stored, first: int, last: int, read: Read) -> Values:
        import numpy as np

        from gptoss_convert.codecs.decoders.numbers import E2M1, E4M3, bf16

        # Rows across the packed axis: of one value each where that is the last axis.
        width = stored.shape[-1] if stored.numbers["second_to_last"] else 1
        low, high = first // width // BLOCK * BLOCK, -(-last // (width * BLOCK)) * BLOCK
        codes = read("codes", low // 2 * width, high // 2 * width).reshape(-1, width)
        values = np.empty((high - low, width), np.float32)
        values[::2], values[1::2] = E2M1[codes & 15], E2M1[codes >> 4]
        scales = read("scales", low // BLOCK * width, high // BLOCK * width).view(np.uint8)
        blocks = E4M3[scales].reshape(-1, 1, width)
        count = math.prod(stored.members["global"].shape)
        matrices = np.arange(low, high, BLOCK) * width // (math.prod(stored.shape) // count)
        common = read("global", 0, count)[matrices].reshape(-1, 1, 1)
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
            blocks = blocks / common if stored.numbers["divided"] else blocks * common
            found = values.reshape(-1, BLOCK, width) * blocks
        return bf16(found.reshape(-1)[first - low * width : last - low * width])


DECODER = Nvfp4()

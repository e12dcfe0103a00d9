"""MXFP4 as compressed-tensors stores it: rows of E2M1 codes, one E8M0 scale for 32 of them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from gptoss_convert.codecs.decoders.decoder import Member, Stored, require
from gptoss_convert.errors import InputError

if TYPE_CHECKING:
    from gptoss_convert.codecs.decoders.decoder import Read, Values

BLOCK = 32


class Mxfp4Rows:
    """`codes`, two a byte, low nibble first, and `scales`, 2^(byte - 127); exact in BF16."""

    dtypes: Mapping[str, frozenset[str]] = MappingProxyType(
        {"codes": frozenset({"U8"}), "scales": frozenset({"U8", "F8_E8M0"})}
    )

    def shape(self, members: Mapping[str, Member], numbers: Mapping[str, float]) -> tuple[int, ...]:
        *rows, half = members["codes"].shape
        if 2 * half % BLOCK:
            raise InputError(f"codes have rows of {2 * half} values, no whole blocks of {BLOCK}")
        require({"scales": (*rows, 2 * half // BLOCK)}, members)
        return (*rows, 2 * half)

    def decode(self, stored: Stored, first: int, last: int, read: Read) -> Values:
        import numpy as np

        from gptoss_convert.codecs.decoders.numbers import PAIRS, bf16

        low, high = first // BLOCK * BLOCK, -(-last // BLOCK) * BLOCK
        values = PAIRS[read("codes", low // 2, high // 2)].reshape(-1, BLOCK)
        scales = read("scales", low // BLOCK, high // BLOCK).view(np.uint8)
        # In float64, whose range holds every product: 255 stands for NaN.
        powers = np.where(scales == 255, np.nan, np.ldexp(1.0, scales.astype(np.int32) - 127))
        with np.errstate(over="ignore", invalid="ignore"):
            found = (values * powers[:, None]).astype(np.float32)
        return bf16(found.reshape(-1)[first - low : last - low])


DECODER = Mxfp4Rows()

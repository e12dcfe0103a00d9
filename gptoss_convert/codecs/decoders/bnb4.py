"""bitsandbytes' 4 bits, NF4 or FP4: a code picks one of 16 values, times the block's maximum.

`functional.dequantize_4bit`: value = bf16(map[code] * absmax[i / blocksize]); with nested
statistics, absmax = nested_map[absmax] * nested_absmax[i / nested_blocksize] + nested_offset, each
step in float32. Blocks run through the flat tensor, regardless of its rows.
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


class Bnb4:
    """`codes`, two a byte, high nibble first, `absmax`, `map`, and of nested statistics
    `nested_absmax` and `nested_map`."""

    dtypes: Mapping[str, frozenset[str]] = MappingProxyType(
        {
            "codes": frozenset({"U8"}),
            "absmax": frozenset({"U8", "F32"}),
            "map": frozenset({"F32"}),
            "nested_absmax": frozenset({"F32"}),
            "nested_map": frozenset({"F32"}),
        }
    )

    def shape(self, members: Mapping[str, Member], numbers: Mapping[str, float]) -> tuple[int, ...]:
        shape = tuple(int(numbers[f"dim{i}"]) for i in range(int(numbers["dims"])))
        count, block = math.prod(shape), int(numbers["blocksize"])
        if count % 2 or not count:
            raise InputError(f"{count} values in whole bytes of two")
        blocks = -(-count // block)
        require({"codes": (count // 2,), "absmax": (blocks,), "map": (16,)}, members)
        if ("nested_absmax" in members) != (members["absmax"].dtype == "U8"):
            raise InputError(f"absmax is {members['absmax'].dtype}, with no nested_absmax to it")
        if "nested_absmax" in members:
            nested = -(-blocks // int(numbers["nested_blocksize"]))
            require({"nested_absmax": (nested,), "nested_map": (256,)}, members)
        return shape

    def decode(self, stored: Stored, first: int, last: int, read: Read) -> Values:
        import numpy as np

        from gptoss_convert.codecs.decoders.numbers import bf16

        block = int(stored.numbers["blocksize"])
        low, high = first // 2 * 2, -(-last // 2) * 2
        codes = read("codes", low // 2, high // 2)
        levels = read("map", 0, 16)
        pairs = np.stack((levels[codes >> 4], levels[codes & 15]), axis=-1).reshape(-1)
        blocks = np.arange(low, high) // block
        one, end = low // block, (high - 1) // block + 1
        largest = self._absmax(stored, one, end, read)[blocks - one]
        with np.errstate(over="ignore", invalid="ignore"):
            return bf16((pairs * largest)[first - low : last - low])

    def _absmax(self, stored: Stored, first: int, last: int, read: Read):
        import numpy as np

        found = read("absmax", first, last)
        if "nested_absmax" not in stored.members:
            return found
        size = int(stored.numbers["nested_blocksize"])
        low, high = first // size, (last - 1) // size + 1
        scales = read("nested_absmax", low, high)[np.arange(first, last) // size - low]
        levels = read("nested_map", 0, 256)
        return levels[found] * scales + np.float32(stored.numbers["nested_offset"])


DECODER = Bnb4()

"""MXFP4 (OCP Microscaling Formats 1.0): blocks of 32 values, 4 bits each, with one scale a block.

Compiled loops do the bulk, on strided numpy views; where there are none, numpy gives the same bits
(library.py). numpy is imported when something is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from types import MappingProxyType, ModuleType
from typing import TYPE_CHECKING

from gptoss_convert.codecs.codec import Ranges
from gptoss_convert.codecs.stats import EncodeStats, ScaleStatistics

if TYPE_CHECKING:
    from gptoss_convert.codecs.codec import Arrays, Values, Weights

BLOCK = 32
"""Values of one block: 16 bytes, and one byte of scale."""


class Mxfp4:
    """`blocks`, two E2M1 codes a byte, low nibble first, and `scales`, one E8M0 byte a block."""

    name = "mxfp4"
    members: Mapping[str, str] = MappingProxyType({"blocks": "U8", "scales": "U8"})
    block = BLOCK
    hints = ("scales",)
    magnitudes = ("blocks", 0x77)  # Bit 3 of each nibble is the sign.

    def member_box(self, member: str, box: Ranges) -> Ranges:
        lo, hi = box[-1]
        rows = (*box[:-1], (lo // BLOCK, -(-hi // BLOCK)))
        return (*rows, (0, BLOCK // 2)) if member == "blocks" else rows

    def decode(self, parts: Arrays, values: Values) -> None:
        _module("codec").decode(parts["blocks"], parts["scales"], values)

    def encode(self, values: Values, parts: Arrays, hints: Arrays) -> EncodeStats:
        former = hints.get("scales")
        return _module("codec").encode(values, parts["blocks"], parts["scales"], former)

    def same(self, parts: Arrays, values: Values) -> bool:
        return _module("codec").same(parts["blocks"], parts["scales"], values)

    def statistics(self, parts: Arrays) -> ScaleStatistics:
        return _module("sums").scale_statistics(parts["blocks"], parts["scales"])

    def weighted_sum(self, parts: Arrays, weights: Weights) -> int | None:
        return _module("sums").weighted_sum(parts["blocks"], parts["scales"], weights)


@cache
def _module(name: str) -> ModuleType:
    return import_module(f"{__name__}.{name}")


CODEC = Mxfp4()

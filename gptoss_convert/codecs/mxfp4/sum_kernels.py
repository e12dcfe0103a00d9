"""Compiled loops of `sums`; importing this module compiles them or loads them."""

from __future__ import annotations

import numpy as np
from numba import int16, int64, njit, uint64

from gptoss_convert.codecs.mxfp4.jit import compiled
from gptoss_convert.codecs.mxfp4.vectors import dot_blocks

_IN8 = "Array(uint8, 1, 'C', readonly=True)"
_IN64 = "Array(uint64, {}, 'C', readonly=True)"
_OFFSETS = "Array(int64, 1, 'C', readonly=True)"

RUN = 32
"""Blocks that `dot_blocks` sums at once, at most."""


@njit(inline="always")
def _limbs(columns):
    """The weights as four signed 16-bit numbers each, 32 of one place side by side."""
    limbs = np.empty(4 * len(columns), np.int16)
    for column in range(len(columns)):
        rest = int64(columns[column])
        for place in range(4):
            limb = int16(rest)
            limbs[column // 32 * 128 + place * 32 + column % 32] = limb
            rest = (rest - limb) >> 16
    return limbs


@compiled(
    f"uint64({_IN8}, {_IN8}, {_OFFSETS}, {_OFFSETS}, UniTuple(int64, 2), "
    f"{_IN64.format(1)}, {_IN64.format(1)})"
)
def block_sum(blocks, scales, block_rows, scale_rows, group, rows, columns):
    """The same sum over the bits of MXFP4 blocks whose scales are 2..252.

    `group` is how far, in bytes, blocks and scales of a row lie apart.
    """
    limbs = _limbs(columns)
    groups = len(columns) // 32
    total = uint64(0)
    for row in range(len(rows)):
        line = uint64(0)
        for g in range(0, groups, RUN):
            b, s = block_rows[row] + g * group[0], scale_rows[row] + g * group[1]
            count = min(RUN, groups - g)
            line += dot_blocks(blocks, b, group[0], scales, s, group[1], limbs, 128 * g, 128, count)
        total += line * rows[row]
    return total


@compiled(f"UniTuple(int64, 2)({_IN64.format(2)})")
def count_blocks(words):
    """How many blocks, two words each, are all zero, and how many others hold no 4 and no 6."""
    zero = 0
    low = 0
    for block in range(len(words)):
        a, b = words[block, 0], words[block, 1]
        high = ((a >> uint64(1)) & (a >> uint64(2))) | ((b >> uint64(1)) & (b >> uint64(2)))
        if (a | b) & uint64(0x7777777777777777) == uint64(0):
            zero += 1
        elif high & uint64(0x1111111111111111) == uint64(0):
            low += 1
    return zero, low

"""Compiled loops of fingerprints; importing this module compiles them or loads them."""

from __future__ import annotations

from numba import uint64

from gptoss_convert.mxfp4.jit import compiled

_IN16 = "Array(uint16, 1, 'C', readonly=True)"
_IN64 = "Array(uint64, {}, 'C', readonly=True)"


@compiled(
    f"uint64({_IN16}, Array(int64, 1, 'C', readonly=True), {_IN64.format(1)}, int64, "
    f"{_IN64.format(1)})"
)
def weighted_sum(flat, offsets, rows, step, columns):
    """The sum over rows and columns of bits·row weight·column weight, modulo 2^64."""
    total = uint64(0)
    length = len(columns)
    for row in range(len(offsets)):
        start = offsets[row]
        # Slices: numba vectorizes no loop in whose index it must expect a negative number.
        elements = flat[start : start + (length - 1) * step + 1 : step]
        line = uint64(0)
        for column in range(length):
            line += uint64(elements[column]) * columns[column]
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

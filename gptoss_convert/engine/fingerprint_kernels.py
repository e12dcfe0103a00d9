"""Compiled loops of fingerprints; importing this module compiles them or loads them."""

from __future__ import annotations

from numba import njit, uint16, uint64

from gptoss_convert.codecs.mxfp4.jit import compiled
from gptoss_convert.codecs.mxfp4.vectors import prefetch

PIECE = 128
"""Elements of one vectorized loop."""
AHEAD = 1024
"""Elements to prefetch ahead: seven times as fast from memory as without."""

_IN16 = "Array(uint16, 1, 'C', readonly=True)"
_IN64 = "Array(uint64, {}, 'C', readonly=True)"
_OFFSETS = "Array(int64, 1, 'C', readonly=True)"


_ODD = uint16(0x8000)
"""The bit that `_full` sets."""


@njit(inline="always")
def _full(bits):
    """Has the bit of `_ODD` iff these BF16 bits are an infinity or NaN."""
    # Adding 1 to an exponent of all ones carries into the place of the sign.
    return uint16(uint16(bits & uint16(0x7F80)) + uint16(0x80))


@compiled(f"UniTuple(uint64, 2)({_IN16}, {_OFFSETS}, {_IN64.format(1)}, {_IN64.format(1)})")
def weighted_sum(flat, offsets, rows, columns):
    """(the sum over rows and columns of bits·row weight·column weight, modulo 2^64; not 0 if any
    are an infinity or NaN)."""
    total = uint64(0)
    odd = uint16(0)
    length = len(columns)
    whole = length // PIECE * PIECE
    for row in range(len(offsets)):
        start = offsets[row]
        line = uint64(0)
        for begin in range(0, whole, PIECE):
            for ahead in range(0, PIECE, 32):
                prefetch(flat, start + begin + AHEAD + ahead)
            # Slices: numba vectorizes no loop in whose index it must expect a negative number.
            elements = flat[start + begin : start + begin + PIECE]
            weights = columns[begin : begin + PIECE]
            for k in range(PIECE):
                line += uint64(elements[k]) * weights[k]
            # Every operation is rounded: numba would widen it to 64 bits.
            full = uint16(0)
            for k in range(PIECE):
                full = uint16(full | _full(elements[k]))
            odd |= full
        rest = flat[start + whole : start + length]
        for k in range(length - whole):
            line += uint64(rest[k]) * columns[whole + k]
            odd |= _full(rest[k])
        total += line * rows[row]
    return total, uint64(odd & _ODD)


@compiled(f"UniTuple(uint64, 2)({_IN16}, {_OFFSETS}, {_IN64.format(1)}, int64, {_IN64.format(1)})")
def strided_sum(flat, offsets, rows, step, columns):
    """The same where the elements of a row lie `step` apart."""
    total = uint64(0)
    odd = uint16(0)
    for row in range(len(offsets)):
        line = uint64(0)
        for column in range(len(columns)):
            bits = flat[offsets[row] + column * step]
            line += uint64(bits) * columns[column]
            odd |= _full(bits)
        total += line * rows[row]
    return total, uint64(odd & _ODD)

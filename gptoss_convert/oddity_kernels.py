"""Compiled search for infinities and NaN; importing this module compiles it or loads it."""

from __future__ import annotations

from numba import uint64

from gptoss_convert.mxfp4.jit import compiled
from gptoss_convert.mxfp4.vectors import prefetch

_PIECE = 64
_AHEAD = 256


@compiled("uint64(Array(uint64, 1, 'C', readonly=True))")
def exponents_full(words):
    """Nonzero if any 16 bits are a BF16 infinity or NaN; words hold four each."""
    found = uint64(0)
    length = len(words)
    whole = length // _PIECE * _PIECE
    for begin in range(0, whole, _PIECE):
        for ahead in range(0, _PIECE, 8):
            prefetch(words, begin + _AHEAD + ahead)
        piece = words[begin : begin + _PIECE]
        for k in range(_PIECE):
            # Adding 1 to an exponent of all ones carries into the place of the sign.
            found |= (piece[k] & uint64(0x7F807F807F807F80)) + uint64(0x0080008000800080)
    for k in range(whole, length):
        found |= (words[k] & uint64(0x7F807F807F807F80)) + uint64(0x0080008000800080)
    return found & uint64(0x8000800080008000)

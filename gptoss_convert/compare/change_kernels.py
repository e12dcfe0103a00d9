"""The compiled loop of `verify.changes`; importing this module compiles it or loads it."""

from __future__ import annotations

import numpy as np
from numba import uint16, uint32

from gptoss_convert.codecs.mxfp4.jit import compiled

LANES = 128
"""Elements of one vectorized loop, each with a sum of its own: float sums keep their order."""

_EXPONENT = uint16(0x7F80)
_IN16 = "Array(uint16, 1, 'C', readonly=True)"


@compiled(f"UniTuple(int64, 2)({_IN16}, {_IN16}, Array(float64, 2, 'C'), Array(uint32, 2, 'C'))")
def measure(a, b, sums, words):
    """(Changed, not finite) of two arrays whose length is a multiple of LANES.

    `sums` gets squares, squares of differences and the largest difference, a lane each; `words` is
    room for two lines. One loop a quantity: numba vectorizes none that writes many arrays.
    """
    changed, odd = 0, 0
    squares, errors, largest = sums[0], sums[1], sums[2]
    first, last = words[0], words[1]
    x, y = first.view(np.float32), last.view(np.float32)
    for begin in range(0, len(a), LANES):
        # Slices: numba vectorizes no loop in whose index it must expect a negative number.
        p, q = a[begin : begin + LANES], b[begin : begin + LANES]
        here = 0
        for k in range(LANES):
            here += p[k] != q[k]
        changed += here
        for k in range(LANES):
            odd += ((p[k] & _EXPONENT) == _EXPONENT) | ((q[k] & _EXPONENT) == _EXPONENT)
        for k in range(LANES):
            odd_p, odd_q = (p[k] & _EXPONENT) == _EXPONENT, (q[k] & _EXPONENT) == _EXPONENT
            first[k] = uint32(0) if odd_p | odd_q else uint32(p[k]) << uint32(16)
            last[k] = uint32(0) if odd_p | odd_q else uint32(q[k]) << uint32(16)
        for k in range(LANES):
            squares[k] += np.float64(x[k]) * np.float64(x[k])
        if here == 0:
            continue
        for k in range(LANES):
            error = np.float64(y[k]) - np.float64(x[k])
            errors[k] += error * error
        for k in range(LANES):
            error = abs(np.float64(y[k]) - np.float64(x[k]))
            largest[k] = error if error > largest[k] else largest[k]
    return changed, odd

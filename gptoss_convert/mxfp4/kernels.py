"""Compiled kernels on flat arrays: rows x groups of 32 values, any strides (in elements).

Importing this module compiles the kernels or loads them from numba's cache. They assume scales
2..252 (decode) and 3..252 (encode); the callers treat every other block with the reference.
Tuples hold one number per array, in their order; `step` is the values' stride along a group.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint8, uint16

from gptoss_convert.mxfp4.jit import compiled
from gptoss_convert.mxfp4.vectors import SIDE, decode_block, encode_block, largest, transpose

REDO = 1
"""Status of a block that is not exact, or outside the kernel's range: redo it by the reference."""
ZERO = 2
"""Status bit: all values are zero."""
HINTED = 4
"""Status bit: the hint was taken, and the rule would have chosen another scale."""

TILE = 32
"""Rows that are transposed at once: their values fill whole cache lines on both sides."""

IN8 = "Array(uint8, 1, 'C', readonly=True)"
IN16 = "Array(uint16, 1, 'C', readonly=True)"
OUT8 = "Array(uint8, 1, 'C')"
OUT16 = "Array(uint16, 1, 'C')"
SIZE = "UniTuple(int64, 2)"
DECODE = f"void({OUT16}, {IN8}, {IN8}{', UniTuple(int64, 3)' * 1}, {SIZE}" + (
    ", UniTuple(int64, 3)" * 2 + ", int64)"
)
ENCODE = f"void({IN16}, {OUT8}, {OUT8}, {IN8}, {OUT8}, UniTuple(int64, 5), {SIZE}" + (
    ", UniTuple(int64, 5)" * 2 + ", int64)"
)


@njit(inline="always")
def _bias(scale):
    """What decode_block adds to a code's bits."""
    return uint16((uint16(scale) << 7) - 128)


@compiled(DECODE)
def decode_straight(values, blocks, scales, start, size, row, group, step):
    """Values of stride 1 along a group."""
    for r in range(size[0]):
        for g in range(size[1]):
            v = start[0] + r * row[0] + g * group[0]
            b = start[1] + r * row[1] + g * group[1]
            s = start[2] + r * row[2] + g * group[2]
            decode_block(blocks, b, values, v, _bias(scales[s]))


@compiled(DECODE)
def decode_across(values, blocks, scales, start, size, row, group, step):
    """Values of any stride, fast if 1 along rows."""
    tile = np.empty(TILE * 32, np.uint16)
    for g in range(size[1]):
        for first in range(0, size[0], TILE):
            rows = min(TILE, size[0] - first)
            v = start[0] + first * row[0] + g * group[0]
            for r in range(rows):
                b = start[1] + (first + r) * row[1] + g * group[1]
                s = start[2] + (first + r) * row[2] + g * group[2]
                decode_block(blocks, b, tile, r * 32, _bias(scales[s]))
            if rows == TILE and row[0] == 1:
                for k in range(0, 32, SIDE):
                    for r in range(0, TILE, SIDE):
                        transpose(tile, r * 32 + k, 32, values, v + k * step + r, step)
            else:
                for k in range(32):
                    for r in range(rows):
                        values[v + k * step + r * row[0]] = tile[r * 32 + k]


@njit(inline="always")
def _choose(amax, hint):
    """(scale byte, status) of a block; only hints that could be exact are tried."""
    exponent = int(amax >> 7)
    rule = min(max(exponent - 2, 0), 252)
    if amax == 0:
        if hint <= 252 and hint != 0:
            return hint, uint8(ZERO | HINTED)
        return uint8(0), uint8(ZERO)
    if exponent == 255 or rule < 3:
        return uint8(rule), uint8(REDO)
    # Under a scale 8 times the rule's, the largest magnitude has the smallest nonzero code.
    if rule < hint and hint <= min(rule + 3, 254):
        return hint, uint8(HINTED)
    return uint8(rule), uint8(0)


@njit(inline="always")
def _encode(values, v, blocks, b, hint):
    """Encode one block; returns (scale byte, status)."""
    scale, status = _choose(largest(values, v), hint)
    # Zeros have the scale byte 0 but code 0 under any scale in the kernel's range.
    origin = uint16(uint16(max(scale, uint8(3))) << 7)
    if not encode_block(values, v, blocks, b, origin):
        status = uint8(REDO)
    return scale, status


@compiled(ENCODE)
def encode_straight(values, blocks, scales, hints, status, start, size, row, group, step):
    """Values of stride 1 along a group."""
    for r in range(size[0]):
        for g in range(size[1]):
            v = start[0] + r * row[0] + g * group[0]
            b = start[1] + r * row[1] + g * group[1]
            s = start[2] + r * row[2] + g * group[2]
            h = start[3] + r * row[3] + g * group[3]
            t = start[4] + r * row[4] + g * group[4]
            scales[s], status[t] = _encode(values, v, blocks, b, hints[h])


@compiled(ENCODE)
def encode_across(values, blocks, scales, hints, status, start, size, row, group, step):
    """Values of any stride, fast if 1 along rows."""
    tile = np.empty(TILE * 32, np.uint16)
    for g in range(size[1]):
        for first in range(0, size[0], TILE):
            rows = min(TILE, size[0] - first)
            v = start[0] + first * row[0] + g * group[0]
            if rows == TILE and row[0] == 1:
                for k in range(0, 32, SIDE):
                    for r in range(0, TILE, SIDE):
                        transpose(values, v + k * step + r, step, tile, r * 32 + k, 32)
            else:
                for k in range(32):
                    for r in range(rows):
                        tile[r * 32 + k] = values[v + k * step + r * row[0]]
            for r in range(rows):
                b = start[1] + (first + r) * row[1] + g * group[1]
                s = start[2] + (first + r) * row[2] + g * group[2]
                h = start[3] + (first + r) * row[3] + g * group[3]
                t = start[4] + (first + r) * row[4] + g * group[4]
                scales[s], status[t] = _encode(tile, r * 32, blocks, b, hints[h])

"""Compiled kernels on flat arrays: rows x groups of 32 values, any strides (in elements).

Importing this module compiles the kernels or loads them from numba's cache. They assume scales
2..252 (decode) and 3..252 (encode); the callers treat every other block with the reference.
Tuples hold one number per array, in their order; `step` is the values' stride along a group.
"""

from __future__ import annotations

import math

import numpy as np
from numba import float64, int64, njit, uint8, uint16, uint32

from gptoss_convert.mxfp4.jit import compiled
from gptoss_convert.mxfp4.reference import GRID
from gptoss_convert.mxfp4.vectors import (
    SIDE,
    decode_block,
    encode_block,
    largest,
    prefetch,
    transpose,
)

REDO = 1
"""Status of a block outside the kernel's range, or not exact by its hint: for the reference."""
ZERO = 2
"""Status bit: all values are zero."""
HINTED = 4
"""Status bit: the hint was taken, and the rule would have chosen another scale."""

INEXACT = 8
"""Status of a block whose values were rounded: `measure` says how far."""

TILE = 64
"""Rows that are transposed at once: their values fill whole cache lines on both sides."""

AHEAD = 1024
"""Elements to prefetch ahead of a straight read: the block that depends on it takes long."""

IN8 = "Array(uint8, 1, 'C', readonly=True)"
IN16 = "Array(uint16, 1, 'C', readonly=True)"
OUT8 = "Array(uint8, 1, 'C')"
OUT16 = "Array(uint16, 1, 'C')"
TUPLE = {length: f"UniTuple(int64, {length})" for length in (2, 3, 4, 5)}
DECODE = f"void({OUT16}, {IN8}, {IN8}, {TUPLE[3]}, {TUPLE[2]}, {TUPLE[3]}, {TUPLE[3]}, int64)"
ENCODE = (
    f"void({IN16}, {OUT8}, {OUT8}, {IN8}, {OUT8}, "
    f"{TUPLE[5]}, {TUPLE[2]}, {TUPLE[5]}, {TUPLE[5]}, int64)"
)
MEASURE = (
    f"void({IN16}, {IN8}, {IN8}, {IN8}, Array(int64, 1, 'C'), Array(float64, 1, 'C'), "
    f"{TUPLE[4]}, {TUPLE[2]}, {TUPLE[4]}, {TUPLE[4]}, int64)"
)
COPY = f"void({IN16}, {OUT16}, {TUPLE[2]}, {TUPLE[2]}, {TUPLE[2]}, {TUPLE[2]})"


@njit(inline="always")
def _bias(scale):
    """The BF16 bits of 0.5 times the scale."""
    return uint16((uint16(scale) << 7) - 128)


@njit(inline="always")
def _prefetch_rows(array, index, step, rows):
    """Prefetch TILE elements from each of some rows: they are too many for the hardware."""
    for k in range(rows):
        for line in range(0, TILE, 32):
            prefetch(array, index + k * step + line)


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
                _prefetch_rows(values, v + TILE, step, 32)
                for k in range(0, 32, SIDE):
                    for r in range(0, TILE, SIDE):
                        transpose(
                            tile, r * 32 + k, 64, 32, values, v + k * step + r, 2 * step, step
                        )
            else:
                for k in range(32):
                    for r in range(rows):
                        values[v + k * step + r * row[0]] = tile[r * 32 + k]


@njit(inline="always")
def _choose(amax, hint):
    """(scale byte, status) of a block; only hints that could be exact are tried."""
    exponent = int(amax >> 7)
    if 5 <= exponent <= 254:
        # At 8 times the rule's scale, the largest magnitude has the smallest nonzero code.
        if exponent - 2 < hint <= min(exponent + 1, 254):
            return hint, uint8(HINTED)
        return uint8(exponent - 2), uint8(0)
    if amax > 0:
        return uint8(0), uint8(REDO)
    if 0 < hint <= 252:
        return hint, uint8(ZERO | HINTED)
    return uint8(0), uint8(ZERO)


@njit(inline="always")
def _encode(values, v, blocks, b, hint):
    """Encode one block; returns (scale byte, status)."""
    scale, status = _choose(largest(values, v), hint)
    # Zeros have the scale byte 0 but code 0 under any scale in the kernel's range.
    if not encode_block(values, v, blocks, b, _bias(max(scale, uint8(3)))):
        status = uint8(REDO) if status else uint8(INEXACT)
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
            prefetch(values, v + AHEAD)
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
                _prefetch_rows(values, v + TILE, step, 32)
                for k in range(0, 32, SIDE):
                    for r in range(0, TILE, SIDE):
                        transpose(
                            values, v + k * step + r, 2 * step, step, tile, r * 32 + k, 64, 32
                        )
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


@compiled(MEASURE)
def measure(values, blocks, scales, status, counts, sums, start, size, row, group, step):
    """Add up the inexact blocks' values: counts (changed, clipped, flushed) and, as float64,
    sums (squares, squared errors, largest absolute error)."""
    for r in range(size[0]):
        for g in range(size[1]):
            if status[start[3] + r * row[3] + g * group[3]] != INEXACT:
                continue
            v = start[0] + r * row[0] + g * group[0]
            b = start[1] + r * row[1] + g * group[1]
            unit = math.ldexp(1.0, int64(scales[start[2] + r * row[2] + g * group[2]]) - 127)
            for k in range(32):
                bits = np.uint32(uint32(values[v + k * step] & 0x7FFF) << 16)
                value = float64(np.uint32(bits).view(np.float32))
                code = (blocks[b + k // 2] >> (k % 2 * 4)) & 7
                error = abs(value - GRID[code] * unit)
                counts[0] += error != 0
                counts[1] += value > 6 * unit
                counts[2] += code == 0 and value > 0
                sums[0] += value * value
                sums[1] += error * error
                sums[2] = max(sums[2], error)


@compiled(COPY)
def copy_across(source, target, start, size, source_steps, target_steps):
    """target[at(q) + p] = source[from(p) + q] for p, q < size; rows in pairs as in `transpose`.

    `start` holds an offset per array; steps are (of a pair of rows, within it).
    """
    source_pair, source_step = source_steps
    target_pair, target_step = target_steps
    for q0 in range(0, size[1], 32):
        for p0 in range(0, size[0], TILE):
            q1, p1 = min(q0 + 32, size[1]), min(p0 + TILE, size[0])
            q8, p8 = q0 + (q1 - q0) // SIDE * SIDE, p0 + (p1 - p0) // SIDE * SIDE
            for p in range(p0 + TILE, p0 + 2 * TILE):
                prefetch(source, start[0] + p // 2 * source_pair + p % 2 * source_step + q0)
            for q in range(q0, q0 + 32):
                t = start[1] + q // 2 * target_pair + q % 2 * target_step + p0 + TILE
                for line in range(0, TILE, 32):
                    prefetch(target, t + line)
            for p in range(p0, p8, SIDE):
                for q in range(q0, q8, SIDE):
                    s = start[0] + p // 2 * source_pair + q
                    t = start[1] + q // 2 * target_pair + p
                    transpose(
                        source, s, source_pair, source_step, target, t, target_pair, target_step
                    )
            for q in range(q0, q1):
                for p in range(p0 if q >= q8 else p8, p1):
                    s = start[0] + p // 2 * source_pair + p % 2 * source_step + q
                    t = start[1] + q // 2 * target_pair + q % 2 * target_step + p
                    target[t] = source[s]

"""Compiled kernels on flat arrays: rows x groups of 32 values, any strides (in elements).

Importing this module compiles the kernels or loads them from numba's cache. They assume scales
2..252 (decode) and 3..252 (encode); the callers treat every other block with the reference.
Tuples hold one number per array, in their order; `step` is the values' stride along a group.
"""

from __future__ import annotations

import numpy as np
from numba import njit, uint16, uint64

from gptoss_convert.codecs.mxfp4.jit import compiled
from gptoss_convert.codecs.mxfp4.vectors import (
    SIDE,
    WIDE,
    decode_block,
    decode_columns,
    encode_block,
    encode_columns,
    largest,
    largest_of_columns,
    measure_blocks,
    measure_columns,
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

STRIP = 384
"""Rows that are treated together: long runs for the memory, and all they touch fits in a cache."""

TILE = 512
"""Rows and columns that are transposed together: long runs on both sides, all in a cache."""

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
    f"void({IN16}, {IN8}, {IN8}, {IN8}, "
    "Tuple((Array(int64, 2, 'C'), Array(float64, 2, 'C'), Array(uint32, 1, 'C'))), "
    f"{TUPLE[4]}, {TUPLE[2]}, {TUPLE[4]}, {TUPLE[4]}, int64)"
)
COPY = f"void({IN16}, {OUT16}, {TUPLE[2]}, {TUPLE[2]}, {TUPLE[2]}, {TUPLE[2]})"


@njit(inline="always")
def _bias(scale):
    """The BF16 bits of 0.5 times the scale."""
    return uint16((uint16(scale) << 7) - 128)


@compiled(DECODE)
def decode_straight(values, blocks, scales, start, size, row, group, step):
    """Values of stride 1 along a group."""
    gaps = row[1] != size[1] * group[1]  # The processor foresees a row only if it follows.
    for r in range(size[0]):
        for g in range(size[1]):
            v = start[0] + r * row[0] + g * group[0]
            b = start[1] + r * row[1] + g * group[1]
            s = start[2] + r * row[2] + g * group[2]
            if gaps and g % 4 == 0:
                prefetch(blocks, b + row[1])
            decode_block(blocks, b, values, v, _bias(scales[s]))


@compiled(DECODE)
def decode_across(values, blocks, scales, start, size, row, group, step):
    """Values of any stride, fast if 1 along rows."""
    tile = np.empty(32, np.uint16)
    biases = np.empty(STRIP, np.uint16)
    for first in range(0, size[0], STRIP):
        rows = min(STRIP, size[0] - first)
        wide = rows // WIDE * WIDE if row[0] == 1 else 0
        for g in range(size[1]):
            v = start[0] + first * row[0] + g * group[0]
            b = start[1] + first * row[1] + g * group[1]
            s = start[2] + first * row[2] + g * group[2]
            for r in range(rows):
                biases[r] = _bias(scales[s + r * row[2]])
            for r in range(0, wide, WIDE):
                decode_columns(blocks, b + r * row[1], row[1], biases, r, values, v + r, step)
            for r in range(wide, rows):
                decode_block(blocks, b + r * row[1], tile, 0, biases[r])
                for k in range(32):
                    values[v + r * row[0] + k * step] = tile[k]


@njit(inline="always")
def _choose(amax, hint):
    """(scale byte, status) of a block; only hints that could be exact are tried."""
    exponent, wanted = uint16(amax >> uint16(7)), uint16(hint)
    # Differences wrap: what is below a range is far above it.
    usual = uint16(exponent - uint16(5)) <= uint16(249)
    # At 8 times the rule's scale, the largest magnitude has the smallest nonzero code.
    above = uint16(wanted - exponent) + uint16(1)
    close = (uint16(above) <= uint16(2)) & (wanted <= uint16(254))
    zero = amax == uint16(0)
    taken = (usual & close) | (zero & (uint16(wanted - uint16(1)) <= uint16(251)))
    ruled = uint16(exponent - uint16(2)) if usual else uint16(0)
    seen = uint16(0) if usual else uint16(ZERO) if zero else uint16(REDO)
    return wanted if taken else ruled, seen | uint16(HINTED) if taken else seen


@njit(inline="always")
def _usable_bias(scale):
    """Zeros have the scale byte 0 but code 0 under any scale in the kernel's range."""
    return _bias(max(uint16(scale), uint16(3)))


@njit(inline="always")
def _not_exact(status):
    return uint16(REDO) if status else uint16(INEXACT)


@njit(inline="always")
def _encode(values, v, blocks, b, hint):
    """Encode one block; returns (scale byte, status)."""
    scale, status = _choose(largest(values, v), hint)
    if not encode_block(values, v, blocks, b, _usable_bias(scale)):
        status = _not_exact(status)
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
            scale, seen = _encode(values, v, blocks, b, hints[uint64(h)])
            scales[uint64(s)], status[uint64(t)] = scale, seen


@compiled(ENCODE)
def encode_across(values, blocks, scales, hints, status, start, size, row, group, step):
    """Values of any stride, fast if 1 along rows."""
    tile = np.empty(32, np.uint16)
    largest_of, hint_of, scale_of, status_of, biases, differ = np.empty((6, STRIP), np.uint16)
    for first in range(0, size[0], STRIP):
        rows = min(STRIP, size[0] - first)
        wide = rows // WIDE * WIDE if row[0] == 1 else 0
        for g in range(size[1]):
            v = start[0] + first * row[0] + g * group[0]
            b = start[1] + first * row[1] + g * group[1]
            s = start[2] + first * row[2] + g * group[2]
            h = start[3] + first * row[3] + g * group[3]
            t = start[4] + first * row[4] + g * group[4]
            for r in range(0, wide, WIDE):
                largest_of_columns(values, v + r, step, largest_of, r)
            for r in range(wide):
                hint_of[r] = hints[uint64(h + r * row[3])]
            for r in range(wide):
                scale_of[r], status_of[r] = _choose(largest_of[r], hint_of[r])
                biases[r] = _usable_bias(scale_of[r])
            for r in range(0, wide, WIDE):
                encode_columns(
                    values, v + r, step, biases, r, blocks, b + r * row[1], row[1], differ, r
                )
            for r in range(wide):
                status_of[r] = _not_exact(status_of[r]) if differ[r] else status_of[r]
            for r in range(wide):
                scales[uint64(s + r * row[2])] = scale_of[r]
            for r in range(wide):
                status[uint64(t + r * row[4])] = status_of[r]
            for r in range(wide, rows):
                for k in range(32):
                    tile[k] = values[v + r * row[0] + k * step]
                scales[s + r * row[2]], status[t + r * row[4]] = _encode(
                    tile, 0, blocks, b + r * row[1], hints[h + r * row[3]]
                )


@njit(inline="always")
def _bias_and_mask(scale, status):
    """What `measure_blocks` sees a block by: only inexact blocks count."""
    return _usable_bias(scale), uint16(0xFFFF) if status == INEXACT else uint16(0)


@compiled(MEASURE)
def measure_straight(values, blocks, scales, status, totals, start, size, row, group, step):
    """What `measure_blocks` adds up, of the inexact blocks; their bytes are not needed."""
    biases, masks = np.empty((2, STRIP), np.uint16)
    for r in range(size[0]):
        for first in range(0, size[1], STRIP):
            v = start[0] + r * row[0] + first * group[0]
            s = start[2] + r * row[2] + first * group[2]
            t = start[3] + r * row[3] + first * group[3]
            count = min(STRIP, size[1] - first)
            used = uint16(0)
            for g in range(count):
                biases[g], masks[g] = _bias_and_mask(
                    scales[uint64(s + g * group[2])], status[uint64(t + g * group[3])]
                )
                used |= masks[g]
            if used:
                measure_blocks(values, v, group[0], biases, masks, 0, count, *totals)


@compiled(MEASURE)
def measure_across(values, blocks, scales, status, totals, start, size, row, group, step):
    """Values of any stride, fast if 1 along rows."""
    tile = np.empty(32, np.uint16)
    biases, masks = np.empty((2, STRIP), np.uint16)
    for first in range(0, size[0], STRIP):
        rows = min(STRIP, size[0] - first)
        wide = rows // WIDE * WIDE if row[0] == 1 else 0
        for g in range(size[1]):
            v = start[0] + first * row[0] + g * group[0]
            s = start[2] + first * row[2] + g * group[2]
            t = start[3] + first * row[3] + g * group[3]
            used = uint16(0)
            for r in range(rows):
                biases[r], masks[r] = _bias_and_mask(
                    scales[uint64(s + r * row[2])], status[uint64(t + r * row[3])]
                )
                used |= masks[r]
            if not used:
                continue
            for r in range(0, wide, WIDE):
                measure_columns(values, v + r, step, biases, masks, r, 32, *totals)
            for r in range(wide, rows):
                for k in range(32):
                    tile[k] = values[v + r * row[0] + k * step]
                measure_blocks(tile, 0, 0, biases, masks, r, 1, *totals)


@compiled(COPY)
def copy_across(source, target, start, size, source_steps, target_steps):
    """target[at(q) + p] = source[from(p) + q] for p, q < size; rows in pairs as in `transpose`.

    `start` holds an offset per array; steps are (of a pair of rows, within it).
    """
    source_pair, source_step = source_steps
    target_pair, target_step = target_steps
    for corner in range(0, size[0], TILE):
        for q0 in range(0, size[1], TILE):
            q1 = min(q0 + TILE, size[1])
            for p0 in range(corner, min(corner + TILE, size[0]), WIDE):
                p1 = min(p0 + WIDE, size[0])
                q8 = q0 + (q1 - q0) // SIDE * SIDE if p1 - p0 == WIDE else q0
                s = start[0] + p0 // 2 * source_pair
                for q in range(q0, q8, SIDE):
                    t = start[1] + q // 2 * target_pair + p0
                    transpose(
                        source, s + q, source_pair, source_step, target, t, target_pair, target_step
                    )
                for q in range(q8, q1):
                    for p in range(p0, p1):
                        s = start[0] + p // 2 * source_pair + p % 2 * source_step + q
                        t = start[1] + q // 2 * target_pair + q % 2 * target_step + p
                        target[t] = source[s]

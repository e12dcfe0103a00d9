"""Compiled kernels on flat arrays: rows x groups of 32 values, any strides (in elements).

Tuples hold one number per array, in their order.

Importing this module compiles the kernels or loads them from numba's cache. They assume scales
2..252 (decode) and 3..252 (encode); the callers treat every other block with the reference.
Small integer types are spelled out at each operation, because numba would widen to 64 bits and
LLVM would then use an eighth or a quarter of each vector register.
"""

from __future__ import annotations

import numpy as np
from numba import int16, njit, uint8, uint16

from gptoss_convert.mxfp4.jit import compiled

REDO = 1
"""Status bit: the block is not exact, or outside the kernel's range; redo it by the reference."""
ZERO = 2
"""Status bit: all values are zero."""
HINTED = 4
"""Status bit: the hint was taken, and the rule would have chosen another scale."""

IN8 = "Array(uint8, 1, 'C', readonly=True)"
IN16 = "Array(uint16, 1, 'C', readonly=True)"
OUT8 = "Array(uint8, 1, 'C')"
OUT16 = "Array(uint16, 1, 'C')"
PAIR = "UniTuple(int64, 2)"
TRIPLE = "UniTuple(int64, 3)"
QUINTUPLE = "UniTuple(int64, 5)"


@njit(inline="always")
def _value(code, bias):
    """BF16 bits of a code in 0..15; bias is (scale << 7) - 128."""
    low = uint16(code & uint16(7))
    bits = uint16(uint16(bias + uint16(low << uint16(6))) - (uint16(low == uint16(1)) << uint16(6)))
    bits = uint16(bits if low != uint16(0) else uint16(0))
    return uint16(bits | uint16(uint16(code & uint16(8)) << uint16(12)))


@njit(inline="always")
def _code(magnitude, origin):
    """The E2M1 code of BF16 bits without sign; origin is the scale as BF16 bits."""
    d = int16(magnitude - origin)
    code = uint16(d > int16(-256))
    code = uint16(code + uint16(d >= int16(-64)))
    code = uint16(code + uint16(d > int16(32)))
    code = uint16(code + uint16(d >= int16(96)))
    code = uint16(code + uint16(d > int16(160)))
    code = uint16(code + uint16(d >= int16(224)))
    return uint16(code + uint16(d > int16(288)))


@njit(inline="always")
def _choose(amax, hint):
    """(scale byte, status) of a block; only hints that could be exact are tried."""
    exponent = int16(amax >> uint16(7))
    rule = int16(min(max(exponent, int16(2)) - int16(2), 252))
    status = uint8(0)
    scale = rule
    if amax == 0:
        status = uint8(ZERO)
        if hint <= 252:
            scale = int16(hint)
    elif exponent == 255 or rule < 3:
        status = uint8(REDO)
    elif rule < hint and hint <= min(rule + 3, 254):
        scale = int16(hint)
    if scale != rule:
        status = uint8(status | uint8(HINTED))
    return uint8(scale), status


@compiled(f"void({OUT16}, {IN8}, {IN8}, {TRIPLE}, {PAIR}, {TRIPLE}, {TRIPLE}, int64)")
def decode_straight(values, blocks, scales, start, size, row, group, step):
    """Values of stride 1 along a group."""
    for r in range(size[0]):
        for g in range(size[1]):
            b = start[1] + r * row[1] + g * group[1]
            v = start[0] + r * row[0] + g * group[0]
            scale = uint16(scales[start[2] + r * row[2] + g * group[2]])
            bias = uint16(uint16(scale << uint16(7)) - uint16(128))
            for j in range(16):
                byte = uint16(blocks[b + j])
                values[v + 2 * j] = _value(uint16(byte & uint16(15)), bias)
                values[v + 2 * j + 1] = _value(uint16(byte >> uint16(4)), bias)


@compiled(f"void({OUT16}, {IN8}, {IN8}, {TRIPLE}, {PAIR}, {TRIPLE}, {TRIPLE}, int64)")
def decode_across(values, blocks, scales, start, size, row, group, step):
    """Values of any stride along a group, best 1 along rows: whole output rows are written."""
    rows = size[0]
    tile = np.empty((16, rows), np.uint8)
    bias = np.empty(rows, np.uint16)
    for g in range(size[1]):
        for r in range(rows):
            b = start[1] + r * row[1] + g * group[1]
            scale = uint16(scales[start[2] + r * row[2] + g * group[2]])
            bias[r] = uint16(uint16(scale << uint16(7)) - uint16(128))
            for j in range(16):
                tile[j, r] = blocks[b + j]
        for j in range(16):
            v = start[0] + g * group[0] + 2 * j * step
            for r in range(rows):
                values[v + r * row[0]] = _value(uint16(tile[j, r] & uint8(15)), bias[r])
            v += step
            for r in range(rows):
                values[v + r * row[0]] = _value(uint16(tile[j, r] >> uint8(4)), bias[r])


@compiled(
    f"void({IN16}, {OUT8}, {OUT8}, {IN8}, {OUT8}, "
    f"{QUINTUPLE}, {PAIR}, {QUINTUPLE}, {QUINTUPLE}, int64)"
)
def encode_straight(values, blocks, scales, hints, status, start, size, row, group, step):
    """Values of stride 1 along a group."""
    codes = np.empty(32, np.uint16)
    for r in range(size[0]):
        for g in range(size[1]):
            v = start[0] + r * row[0] + g * group[0]
            b = start[1] + r * row[1] + g * group[1]
            s = start[2] + r * row[2] + g * group[2]
            h = start[3] + r * row[3] + g * group[3]
            t = start[4] + r * row[4] + g * group[4]
            amax = uint16(0)
            for j in range(32):
                amax = max(amax, uint16(values[v + j * step] & uint16(0x7FFF)))
            scale, state = _choose(amax, hints[h])
            origin = uint16(uint16(max(scale, uint8(3))) << uint16(7))
            bias = uint16(origin - uint16(128))
            wrong = uint16(state & uint8(REDO))
            for j in range(32):
                value = values[v + j * step]
                code = _code(uint16(value & uint16(0x7FFF)), origin)
                code = uint16(code | uint16(uint16(value >> uint16(12)) & uint16(8)))
                wrong = uint16(wrong | uint16(_value(code, bias) ^ value))
                codes[j] = code
            for j in range(16):
                blocks[b + j] = uint8(codes[2 * j] | uint16(codes[2 * j + 1] << uint16(4)))
            scales[s] = scale
            status[t] = state if wrong == uint16(0) else uint8(REDO)


encode_across = encode_straight

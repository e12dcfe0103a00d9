"""Decode and encode strided views: compiled where possible, checked always."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence

import numpy as np

from gptoss_convert.codecs.mxfp4 import axes, library, reference
from gptoss_convert.codecs.mxfp4.library import address, numbers
from gptoss_convert.codecs.mxfp4.reference import MAX_SCALE, NO_HINT, U8, U16
from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.errors import CodecError

_BATCH = 1 << 10
"""Blocks at a time in numpy: bounds the memory of its intermediate arrays."""

_LARGEST_CODE = {253: 5, 254: 3, 255: -1}
"""By scale byte: the largest code magnitude that is finite in BF16; 255 stands for NaN."""

_COUNTS = (
    *("zero_blocks", "hinted_blocks", "min_scale", "max_scale", "inexact_blocks"),
    *("first_inexact", "inexact_values", "nonfinite", "clipped", "flushed"),
)
_SUMS = ("squares", "squared_error")


class _Encoded(ctypes.Structure):
    """`struct encoded` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in _COUNTS),
        *((name, ctypes.c_double * 8) for name in (*_SUMS, "max_abs_error")),
    )


def decode(blocks: U8, scales: U8, values: U16) -> None:
    """Expand blocks (*rows, groups, 16) and scales (*rows, groups) to BF16 bits (*rows, groups*32).

    Exact, subnormals and the sign of zero included. Raises CodecError, before anything is written,
    for the first block with scale 255 (NaN) or with a value beyond BF16 (scales 253 and 254).
    """
    grouped = _grouped(blocks, scales, values)
    if scales.size == 0:
        return
    refuse_overflow(blocks, scales)
    kernels = library.load()
    if kernels is None or blocks.strides[-1] != 1:
        for piece in axes.pieces(scales.shape, _BATCH):
            grouped[piece] = reference.decode_blocks(blocks[piece], scales[piece])
        return
    for starts, *loops in _runs(scales.shape, grouped.strides, blocks.strides, scales.strides):
        views = map(address, (grouped, blocks, scales), starts)
        kernels.decode(*views, *loops, grouped.strides[-1])


def same(blocks: U8, scales: U8, values: U16) -> bool:
    """Whether blocks and scales stand for exactly these BF16 bits, shaped and refused as in
    `decode`; what they stand for takes no memory."""
    grouped = _grouped(blocks, scales, values)
    if scales.size == 0:
        return True
    refuse_overflow(blocks, scales)
    kernels = library.load()
    if kernels is None or blocks.strides[-1] != 1:
        return all(
            np.array_equal(reference.decode_blocks(blocks[piece], scales[piece]), grouped[piece])
            for piece in axes.pieces(scales.shape, _BATCH)
        )
    loops = _runs(scales.shape, grouped.strides, blocks.strides, scales.strides)
    views = grouped, blocks, scales
    return all(
        kernels.same_decoded(*map(address, views, starts), *steps, grouped.strides[-1])
        for starts, *steps in loops
    )


def encode(values: U16, blocks: U8, scales: U8, hints: U8 | None = None) -> EncodeStats:
    """Quantise BF16 bits (*rows, groups*32) to blocks (*rows, groups, 16), scales (*rows, groups).

    The scale is 2^(floor(log2 amax) - 2) as a byte within 0..252, 0 for a block of zeros (the
    smallest scale, as OCP MX 1.0, 6.3 gives for the smallest amax); elements are rounded to nearest
    even and saturated, the sign of zero is kept. A hint, shaped like `scales`, replaces the scale
    iff every value of the block is exact under it (a block of zeros takes any hint up to 252):
    hints never change a value.
    """
    grouped = _grouped(blocks, scales, values)
    if hints is None:
        hints = np.broadcast_to(np.uint8(NO_HINT), scales.shape)
    if hints.shape != scales.shape:
        raise ValueError(f"hints: expected shape {scales.shape}, found {hints.shape}")
    if scales.size == 0:
        return EncodeStats()
    kernels = library.load()
    if kernels is None or blocks.strides[-1] != 1:
        return _encode_by_reference(grouped, blocks, scales, hints)
    made = _Encoded(min_scale=255, first_inexact=-1)
    views = grouped, blocks, scales, hints
    numbering = np.empty(scales.shape, np.uint8).strides  # the blocks' numbers in C order
    for starts, *loops in _runs(scales.shape, *(view.strides for view in views), numbering):
        memory = map(address, views, starts)
        kernels.encode(*memory, starts[-1], *loops, grouped.strides[-1], ctypes.byref(made))
    return EncodeStats(
        blocks=scales.size,
        max_abs_error=max(made.max_abs_error),
        **{name: getattr(made, name) for name in _COUNTS},
        **{name: sum(getattr(made, name)) for name in _SUMS},
    )


def _encode_by_reference(values: U16, blocks: U8, scales: U8, hints: U8) -> EncodeStats:
    stats = EncodeStats()
    for piece in axes.pieces(scales.shape, _BATCH):
        blocks[piece], scales[piece], part = reference.encode_blocks(values[piece], hints[piece])
        stats += part
    return stats


def _grouped(blocks: U8, scales: U8, values: U16) -> U16:
    """`values` seen as (*rows, groups, 32); raises ValueError if the three shapes disagree."""
    *rows, groups = scales.shape
    if blocks.shape != (*rows, groups, 16):
        raise ValueError(f"blocks: expected shape {(*rows, groups, 16)}, found {blocks.shape}")
    if values.shape != (*rows, groups * 32):
        raise ValueError(f"values: expected shape {(*rows, groups * 32)}, found {values.shape}")
    *steps, step = values.strides
    shape = (*rows, groups, 32)
    return np.lib.stride_tricks.as_strided(values, shape, (*steps, 32 * step, step))


def _runs(shape: Sequence[int], *strides: Sequence[int]) -> Iterator[tuple]:
    """What the kernels take, call by call, to pass over the blocks of this shape: the operands'
    offsets, rows, groups, the operands' strides from row to row and from group to group.

    Rows are the axis along which the first operand, the values, lies closest.
    """
    last = len(shape) - 1
    outer = axes.merged(shape[:last], *(steps[:last] for steps in strides))
    closest = min(outer, key=lambda axis: abs(axis.strides[0]), default=None)
    rows = closest or axes.Axis(1, (0,) * len(strides))
    group = numbers([steps[last] for steps in strides])
    outer = [axis for axis in outer if axis is not closest]
    for starts in axes.offsets(outer, len(strides)):
        yield starts, rows.length, shape[last], numbers(rows.strides), group


def refuse_overflow(blocks: U8, scales: U8) -> None:
    """Raise CodecError for the first block that has no finite BF16 value."""
    if scales.max(initial=0) <= MAX_SCALE:
        return
    found = np.flatnonzero(scales > MAX_SCALE)
    for start in range(0, found.size, _BATCH):
        index = np.unravel_index(found[start : start + _BATCH], scales.shape)
        codes = np.maximum(blocks[index] & 7, (blocks[index] >> 4) & 7).max(axis=-1)
        limits = np.array([_LARGEST_CODE[int(scale)] for scale in scales[index]])
        bad = np.flatnonzero(codes > limits)
        if bad.size:
            where = tuple(int(axis[bad[0]]) for axis in index)
            scale = int(scales[where])
            found = "is NaN" if scale == 255 else f"with code {codes[bad[0]]} overflows BF16"
            raise CodecError(f"block {where}: expected a scale byte 0..252, found {scale}, {found}")

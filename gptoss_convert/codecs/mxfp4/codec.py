"""Decode and encode strided views: bounded pieces, compiled where possible, checked always."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.codecs.mxfp4 import axes, reference
from gptoss_convert.codecs.mxfp4.jit import kernels
from gptoss_convert.codecs.mxfp4.reference import MAX_SCALE, NO_HINT, U8, U16
from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.errors import CodecError

Index = tuple[NDArray[np.intp], ...]

_PIECE = 1 << 19
"""Blocks per kernel call of an encoding: the status of each takes a byte."""

_BATCH = 1 << 10
"""Blocks at a time in numpy: bounds the memory of its intermediate arrays."""

_LARGEST_CODE = {253: 5, 254: 3, 255: -1}
"""By scale byte: the largest code magnitude that is finite in BF16; 255 stands for NaN."""


def decode(blocks: U8, scales: U8, values: U16) -> None:
    """Expand blocks (*rows, groups, 16) and scales (*rows, groups) to BF16 bits (*rows, groups*32).

    Exact, subnormals and the sign of zero included. Raises CodecError, before anything is written,
    for the first block with scale 255 (NaN) or with a value beyond BF16 (scales 253 and 254).
    """
    grouped = _grouped(blocks, scales, values)
    if scales.size == 0:
        return
    refuse_overflow(blocks, scales)
    module = kernels()
    if module is None or not _walk(
        module.decode_straight, module.decode_across, grouped, blocks, scales
    ):
        for piece in axes.pieces(scales.shape, _BATCH):
            grouped[piece] = reference.decode_blocks(blocks[piece], scales[piece])
    elif scales.min() < 2:
        for index, _ in _batches(scales < 2):
            grouped[index] = reference.decode_blocks(blocks[index], scales[index])


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
    stats = EncodeStats()
    if scales.size == 0:
        return stats
    module = kernels()
    for piece in axes.pieces(scales.shape, _PIECE):
        views = grouped[piece], blocks[piece], scales[piece], hints[piece]
        stats += _encode_piece(module, *views) if module else _encode_by_reference(*views)
    return stats


def _encode_piece(
    module: ModuleType, values: U16, blocks: U8, scales: U8, hints: U8
) -> EncodeStats:
    """Encode by kernel, then the blocks that it leaves to the reference; or all by the latter."""
    status = np.empty_like(values[..., 0], np.uint8)  # Its axes in the order of the values'.
    views = values, blocks, scales, hints, status
    if not _walk(module.encode_straight, module.encode_across, *views):
        return _encode_by_reference(values, blocks, scales, hints)
    seen = int(np.bitwise_or.reduce(status, axis=None))
    stats = EncodeStats()
    if seen & module.INEXACT:
        stats = _measured(module, values, blocks, scales, status)
    if seen & module.REDO:
        for index, flat in _batches(status == module.REDO):
            stats = _with(stats, _redo(index, flat, values, blocks, scales, hints))
    counted = scales
    if seen & (module.REDO | module.ZERO):
        counted = scales[(status & (module.REDO | module.ZERO)) == 0]
    return stats + EncodeStats(
        blocks=scales.size,
        zero_blocks=int(np.count_nonzero(status & module.ZERO)),
        min_scale=int(counted.min(initial=255)),
        max_scale=int(counted.max(initial=0)),
        hinted_blocks=int(np.count_nonzero(status & module.HINTED)),
    )


def _measured(module: ModuleType, values: U16, blocks: U8, scales: U8, status: U8) -> EncodeStats:
    """What the kernel rounded; the blocks themselves are left uncounted."""
    inexact = status == module.INEXACT
    # A sum per lane, so that the lanes of a vector need not wait for each other.
    totals = np.zeros((3, 32), np.int64), np.zeros((2, 32)), np.zeros(32, np.uint32)

    def adding(kernel: Callable) -> Callable:
        return lambda *arguments: kernel(*arguments[:4], totals, *arguments[4:])

    straight, across = adding(module.measure_straight), adding(module.measure_across)
    _walk(straight, across, values, blocks, scales, status)
    changed, clipped, flushed = totals[0].sum(axis=1)
    squares, squared_error = totals[1].sum(axis=1)
    return EncodeStats(
        inexact_blocks=int(np.count_nonzero(inexact)),
        inexact_values=int(changed),
        clipped=int(clipped),
        flushed=int(flushed),
        squares=float(squares),
        squared_error=float(squared_error),
        max_abs_error=float(totals[2].view(np.float32).max()),
        first_inexact=int(inexact.argmax()),
    )


def _with(stats: EncodeStats, others: EncodeStats) -> EncodeStats:
    """The sum for blocks that lie among each other, not one part after the other."""
    firsts = [part.first_inexact for part in (stats, others) if part.first_inexact >= 0]
    return replace(stats + others, first_inexact=min(firsts, default=-1))


def _redo(
    index: Index, flat: NDArray[np.intp], values: U16, blocks: U8, scales: U8, hints: U8
) -> EncodeStats:
    """Encode the blocks at `index` by the reference; the statistics leave them uncounted."""
    blocks[index], scales[index], stats = reference.encode_blocks(values[index], hints[index])
    first = int(flat[stats.first_inexact]) if stats.first_inexact >= 0 else -1
    return replace(stats, blocks=0, first_inexact=first)


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


def _walk(straight: Callable, across: Callable, *views: U8 | U16) -> bool:
    """Run a kernel over the views (values, blocks, then one element per block); False if it cannot.

    `straight` is for values of stride 1 along a group. The kernels' row axis is the one along
    which the values lie closest; Python loops over the axes that remain.
    """
    strides = [steps for view in views if (steps := axes.element_strides(view)) is not None]
    if len(strides) < len(views) or strides[1][-1] != 1:
        return False
    *shape, groups = views[-1].shape
    last = len(shape)
    outer = axes.merged(shape, *(steps[:last] for steps in strides)) or [
        axes.Axis(1, (0,) * len(views))
    ]
    rows = outer.pop(min(range(len(outer)), key=lambda i: outer[i].strides[0]))
    group = tuple(steps[last] for steps in strides)
    step = strides[0][-1]
    kernel = straight if step == 1 else across
    memory = [axes.flat(view) for view in views]
    for start in axes.offsets(outer, len(views)):
        kernel(*memory, start, (rows.length, groups), rows.strides, group, step)
    return True


def _batches(mask: NDArray[np.bool_]) -> Iterator[tuple[Index, NDArray[np.intp]]]:
    """Indices of the true elements in C order, a bounded number at a time: (index, flat index)."""
    found = np.flatnonzero(mask)
    for start in range(0, found.size, _BATCH):
        flat = found[start : start + _BATCH]
        yield np.unravel_index(flat, mask.shape), flat


def refuse_overflow(blocks: U8, scales: U8) -> None:
    """Raise CodecError for the first block that has no finite BF16 value."""
    if scales.max(initial=0) <= MAX_SCALE:
        return
    for index, _ in _batches(scales > MAX_SCALE):
        codes = np.maximum(blocks[index] & 7, (blocks[index] >> 4) & 7).max(axis=-1)
        limits = np.array([_LARGEST_CODE[int(scale)] for scale in scales[index]])
        bad = np.flatnonzero(codes > limits)
        if bad.size:
            where = tuple(int(axis[bad[0]]) for axis in index)
            scale = int(scales[where])
            found = "is NaN" if scale == 255 else f"with code {codes[bad[0]]} overflows BF16"
            raise CodecError(f"block {where}: expected a scale byte 0..252, found {scale}, {found}")

"""Fingerprints: 64 bits a parameter and layer, equal in every format, summed in any order.

The fingerprint of a parameter is the sum over its elements of bits·Πw, modulo 2^64: the element's
BF16 bits times an odd pseudo-random 64-bit weight for its index on each axis but the layer. Being a
sum, it takes tiles in any order and layout. A change of one element always shows; exchanged rows,
transposes and shifts show but for a chance of about 2^-48. It is no defence against forgery:
docs/decisions/0006-fingerprints.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs import mxfp4
from gptoss_convert.codecs.mxfp4 import jit
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import BLOCK

U64 = npt.NDArray[np.uint64]
MASK = (1 << 64) - 1
"""Fingerprints are sums modulo 2^64."""
EXPONENT = 0x7F80
"""Exponent bits of BF16: all set in infinities and NaN."""
_SCRATCH_BYTES = 1 << 19
"""Decoded values that are summed while they are in the cache."""
_SHORT = 64
"""A fastest axis shorter than this is joined with the next one, for long inner loops."""


@dataclass(frozen=True, slots=True)
class ScaleStatistics:
    """What the scales of MXFP4 blocks look like; `a + b` counts both."""

    blocks: int = 0
    zero_blocks: int = 0
    """Blocks whose values are all zero: any scale would do."""
    low_blocks: int = 0
    """Other blocks whose largest value is at most 3: encoding them anew picks another scale."""
    min_scale: int = 255
    max_scale: int = 0

    def __add__(self, other: ScaleStatistics) -> ScaleStatistics:
        return ScaleStatistics(
            self.blocks + other.blocks,
            self.zero_blocks + other.zero_blocks,
            self.low_blocks + other.low_blocks,
            min(self.min_scale, other.min_scale),
            max(self.max_scale, other.max_scale),
        )


@cache
def axis_weights(axis: int, length: int) -> U64:
    """The odd weights of the first `length` indexes of a parameter's axis (splitmix64)."""
    with np.errstate(over="ignore"):
        x = np.arange(1, length + 1, dtype=np.uint64) + np.uint64((axis + 1) << 40)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def fingerprint(bits: npt.NDArray[np.uint16], box: Box, lengths: Sequence[int], layer: int) -> int:
    """The part of a parameter's fingerprint that the elements of `box` make; see `examined`."""
    return examined(bits, box, lengths, layer)[0]


def examined(
    bits: npt.NDArray[np.uint16], box: Box, lengths: Sequence[int], layer: int
) -> tuple[int, bool]:
    """(the part of a parameter's fingerprint that the elements of `box` make, whether any of them
    is an infinity or NaN).

    `bits` is a view of any strides, one axis per axis of the parameter; `layer` is the axis that
    does not count, -1 for none.
    """
    axes = [
        (bits.strides[axis] // 2, axis_weights(axis, lengths[axis])[lo:hi])
        for axis, (lo, hi) in enumerate(box)
        if axis != layer
    ]
    scale = reduce(lambda a, b: a * b & MASK, (int(w[0]) for _, w in axes if len(w) == 1), 1)
    longer = sorted(((s, w) for s, w in axes if len(w) > 1), key=lambda axis: axis[0])
    step, columns = longer.pop(0) if longer else (1, np.ones(1, np.uint64))
    while longer and len(columns) < _SHORT and longer[0][0] == step * len(columns):
        columns = np.multiply.outer(longer.pop(0)[1], columns).ravel()
    offsets, rows = np.zeros(1, np.int64), np.ones(1, np.uint64)
    for stride, weights in reversed(longer):
        offsets = np.add.outer(offsets, stride * np.arange(len(weights))).ravel()
        rows = np.multiply.outer(rows, weights).ravel()
    span = int(offsets[-1]) + step * (len(columns) - 1) + 1
    flat = np.lib.stride_tricks.as_strided(bits, (span,), (2,))
    total, odd = _weighted_sum(flat, offsets, rows, step, columns)
    return total * scale & MASK, odd


def packed_fingerprint(
    blocks: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    box: Box,
    lengths: Sequence[int],
    layer: int,
) -> int:
    """The same of MXFP4 blocks (*rows, groups, 16) with their scales (*rows, groups).

    Raises CodecError for the first block that has no finite BF16 value.
    """
    mxfp4.refuse_overflow(blocks, scales)
    if jit.kernels() is None or blocks.strides[-1] != 1:
        return _fingerprint_by_pieces(blocks, scales, box, lengths, layer)
    from gptoss_convert.engine import fingerprint_kernels as kernels

    block_rows, scale_rows = np.zeros(1, np.int64), np.zeros(1, np.int64)
    rows = np.ones(1, np.uint64)
    for axis, (lo, hi) in enumerate(box[:-1]):
        weights = axis_weights(axis, lengths[axis])[lo:hi]
        if axis == layer:
            weights = np.ones(hi - lo, np.uint64)
        at = np.arange(hi - lo)
        block_rows = np.add.outer(block_rows, blocks.strides[axis] * at).ravel()
        scale_rows = np.add.outer(scale_rows, scales.strides[axis] * at).ravel()
        rows = np.multiply.outer(rows, weights).ravel()
    lo, hi = box[-1]
    columns = axis_weights(len(box) - 1, lengths[-1])[lo:hi]
    group = (blocks.strides[-2], scales.strides[-1])
    total = int(
        kernels.block_sum(
            _flat(blocks), _flat(scales), block_rows, scale_rows, group, rows, columns
        )
    )
    total += _rare_blocks(blocks, scales, box, lengths, layer)
    return total & MASK


def _rare_blocks(
    blocks: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    box: Box,
    lengths: Sequence[int],
    layer: int,
) -> int:
    """The blocks whose scales the kernel leaves out."""
    if int(scales.min()) >= 2 and int(scales.max()) <= 252:
        return 0
    where = np.nonzero((scales < 2) | (scales > 252))
    values = np.empty((len(where[0]), BLOCK), np.uint16)
    mxfp4.decode(blocks[where][:, None], scales[where][:, None], values)
    lo, hi = box[-1]
    columns = axis_weights(len(box) - 1, lengths[-1])[lo:hi].reshape(-1, BLOCK)[where[-1]]
    sums = (values.astype(np.uint64) * columns).sum(axis=1, dtype=np.uint64)
    for axis, ((lo, hi), index) in enumerate(zip(box[:-1], where, strict=False)):
        if axis != layer:
            sums *= axis_weights(axis, lengths[axis])[lo:hi][index]
    return int(sums.sum(dtype=np.uint64))


def _flat(array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Every byte from the array's first element to its last."""
    span = 1 + sum(
        stride * (length - 1) for stride, length in zip(array.strides, array.shape, strict=True)
    )
    return np.lib.stride_tricks.as_strided(array, (span,), (1,))


def _fingerprint_by_pieces(
    blocks: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.uint8],
    box: Box,
    lengths: Sequence[int],
    layer: int,
) -> int:
    total = 0
    for rows, piece in _row_pieces(box):
        values = np.empty(tuple(hi - lo for lo, hi in piece), np.uint16)
        mxfp4.decode(blocks[rows], scales[rows], values)
        total += fingerprint(values, piece, lengths, layer)
    return total & MASK


def _row_pieces(box: Box) -> Iterator[tuple[tuple[slice, ...], Box]]:
    """A box cut along its rows into pieces that a processor's cache holds."""
    shape = [hi - lo for lo, hi in box]
    axis = max(range(len(box) - 1), key=lambda axis: shape[axis])
    per_index = 2 * math.prod(shape) // shape[axis]
    count = max(1, _SCRATCH_BYTES // per_index)
    lo, hi = box[axis]
    for start in range(lo, hi, count):
        span = (start, min(start + count, hi))
        rows = tuple(
            slice(span[0] - lo, span[1] - lo) if other == axis else slice(None)
            for other in range(len(box) - 1)
        )
        yield rows, (*box[:axis], span, *box[axis + 1 :])


def _weighted_sum(
    flat: npt.NDArray[np.uint16], offsets: npt.NDArray[np.int64], rows: U64, step: int, columns: U64
) -> tuple[int, bool]:
    if jit.kernels() is not None:
        from gptoss_convert.engine import fingerprint_kernels as kernels

        if step == 1:
            total, odd = kernels.weighted_sum(flat, offsets, rows, columns)
        else:
            total, odd = kernels.strided_sum(flat, offsets, rows, step, columns)
        return int(total), bool(odd)
    total, found = 0, False
    reach = step * (len(columns) - 1) + 1
    for offset, weight in zip(offsets.tolist(), rows.tolist(), strict=True):
        bits = flat[offset : offset + reach : step]
        line = bits.astype(np.uint64) * columns
        total += int(line.sum(dtype=np.uint64)) * weight
        found = found or bool(((bits & EXPONENT) == EXPONENT).any())
    return total & MASK, found


def combine(layers: Sequence[int]) -> int:
    """The fingerprint of a whole parameter from those of its layers, in order."""
    weights = axis_weights(0, len(layers)).tolist()
    return sum(part * weight for part, weight in zip(layers, weights, strict=True)) & MASK


def scale_statistics(
    blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]
) -> ScaleStatistics:
    """Count blocks (*rows, groups, 16) with their scales (*rows, groups), by what they hold."""
    words = np.ascontiguousarray(blocks).view(np.uint64).reshape(-1, 2)
    flat = np.ascontiguousarray(scales).reshape(-1)
    if jit.kernels() is not None:
        from gptoss_convert.engine import fingerprint_kernels

        zero, low = fingerprint_kernels.count_blocks(words)
    else:
        nonzero = ((words & np.uint64(0x7777777777777777)) != 0).any(axis=1)
        high = (words >> np.uint64(1)) & (words >> np.uint64(2)) & np.uint64(0x1111111111111111)
        zero = int(np.count_nonzero(~nonzero))
        low = int(np.count_nonzero(nonzero & (high == 0).all(axis=1)))
    return ScaleStatistics(
        math.prod(scales.shape), int(zero), int(low), int(flat.min()), int(flat.max())
    )

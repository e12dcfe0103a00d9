"""Fingerprints: 64 bits a parameter and layer, equal in every format, summed in any order.

The fingerprint of a parameter is the sum over its elements of bits·Πw, modulo 2^64: the element's
BF16 bits times an odd pseudo-random 64-bit weight for its index on each axis but the layer. Being a
sum, it takes tiles in any order and layout. A change of one element always shows; exchanged rows,
transposes and shifts show but for a chance of about 2^-48. It is no defence against forgery:
docs/decisions/0006-fingerprints.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy as np
import numpy.typing as npt

from gptoss_convert.layout import Box
from gptoss_convert.mxfp4 import jit

U64 = npt.NDArray[np.uint64]
_MASK = (1 << 64) - 1
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
    """The part of a parameter's fingerprint that the elements of `box` make.

    `bits` is a view of any strides, one axis per axis of the parameter; `layer` is the axis that
    does not count, -1 for none.
    """
    axes = [
        (bits.strides[axis] // 2, axis_weights(axis, lengths[axis])[lo:hi])
        for axis, (lo, hi) in enumerate(box)
        if axis != layer
    ]
    scale = reduce(lambda a, b: a * b & _MASK, (int(w[0]) for _, w in axes if len(w) == 1), 1)
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
    total = _weighted_sum(flat, offsets, rows, step, columns)
    return total * scale & _MASK


def _weighted_sum(
    flat: npt.NDArray[np.uint16], offsets: npt.NDArray[np.int64], rows: U64, step: int, columns: U64
) -> int:
    if jit.kernels() is not None:
        from gptoss_convert import fingerprint_kernels as kernels

        if step == 1:
            return int(kernels.weighted_sum(flat, offsets, rows, columns))
        return int(kernels.strided_sum(flat, offsets, rows, step, columns))
    total = 0
    reach = step * (len(columns) - 1) + 1
    for offset, weight in zip(offsets.tolist(), rows.tolist(), strict=True):
        line = flat[offset : offset + reach : step].astype(np.uint64) * columns
        total += int(line.sum(dtype=np.uint64)) * weight
    return total & _MASK


def combine(layers: Sequence[int]) -> int:
    """The fingerprint of a whole parameter from those of its layers, in order."""
    weights = axis_weights(0, len(layers)).tolist()
    return sum(part * weight for part, weight in zip(layers, weights, strict=True)) & _MASK


def scale_statistics(
    blocks: npt.NDArray[np.uint8], scales: npt.NDArray[np.uint8]
) -> ScaleStatistics:
    """Count blocks (*rows, groups, 16) with their scales (*rows, groups), by what they hold."""
    words = np.ascontiguousarray(blocks).view(np.uint64).reshape(-1, 2)
    flat = np.ascontiguousarray(scales).reshape(-1)
    if jit.kernels() is not None:
        from gptoss_convert import fingerprint_kernels

        zero, low = fingerprint_kernels.count_blocks(words)
    else:
        nonzero = ((words & np.uint64(0x7777777777777777)) != 0).any(axis=1)
        high = (words >> np.uint64(1)) & (words >> np.uint64(2)) & np.uint64(0x1111111111111111)
        zero = int(np.count_nonzero(~nonzero))
        low = int(np.count_nonzero(nonzero & (high == 0).all(axis=1)))
    return ScaleStatistics(
        math.prod(scales.shape), int(zero), int(low), int(flat.min()), int(flat.max())
    )

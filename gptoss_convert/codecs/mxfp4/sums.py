"""Sums over MXFP4 blocks that need no room for values: fingerprints, and what scales hold."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs.mxfp4 import BLOCK, jit
from gptoss_convert.codecs.mxfp4.codec import decode, refuse_overflow
from gptoss_convert.codecs.mxfp4.reference import U8
from gptoss_convert.codecs.stats import ScaleStatistics

U64 = npt.NDArray[np.uint64]


def weighted_sum(blocks: U8, scales: U8, weights: Sequence[U64]) -> int | None:
    """Σ bits·Πw modulo 2^64 over the BF16 values of blocks (*rows, groups, 16) with their scales
    (*rows, groups), w one of `weights` per axis of the values; None without compiled kernels.

    Raises CodecError for the first block that has no finite BF16 value.
    """
    refuse_overflow(blocks, scales)
    if jit.kernels() is None or blocks.strides[-1] != 1:
        return None
    from gptoss_convert.codecs.mxfp4 import sum_kernels as kernels

    block_rows, scale_rows = np.zeros(1, np.int64), np.zeros(1, np.int64)
    rows = np.ones(1, np.uint64)
    *row_weights, columns = weights
    for axis, weight in enumerate(row_weights):
        at = np.arange(len(weight))
        block_rows = np.add.outer(block_rows, blocks.strides[axis] * at).ravel()
        scale_rows = np.add.outer(scale_rows, scales.strides[axis] * at).ravel()
        rows = np.multiply.outer(rows, weight).ravel()
    group = (blocks.strides[-2], scales.strides[-1])
    total = kernels.block_sum(
        _flat(blocks), _flat(scales), block_rows, scale_rows, group, rows, columns
    )
    return int(total) + _rare_blocks(blocks, scales, weights)


def _rare_blocks(blocks: U8, scales: U8, weights: Sequence[U64]) -> int:
    """The sum over the blocks whose scales the kernel leaves out: it builds a value's exponent from
    the scale's byte, which must be neither subnormal nor overflow."""
    if int(scales.min()) >= 2 and int(scales.max()) <= 252:
        return 0
    where = np.nonzero((scales < 2) | (scales > 252))
    values = np.empty((len(where[0]), BLOCK), np.uint16)
    decode(blocks[where][:, None], scales[where][:, None], values)
    columns = weights[-1].reshape(-1, BLOCK)[where[-1]]
    sums = (values.astype(np.uint64) * columns).sum(axis=1, dtype=np.uint64)
    for weight, index in zip(weights[:-1], where, strict=False):
        sums *= weight[index]
    return int(sums.sum(dtype=np.uint64))


def _flat(array: U8) -> U8:
    """Every byte from the array's first element to its last."""
    span = 1 + sum(
        stride * (length - 1) for stride, length in zip(array.strides, array.shape, strict=True)
    )
    return np.lib.stride_tricks.as_strided(array, (span,), (1,))


def scale_statistics(blocks: U8, scales: U8) -> ScaleStatistics:
    """Count blocks (*rows, groups, 16) with their scales (*rows, groups), by what they hold.

    Of the other blocks than those of zeros, low ones hold no magnitude above 3.
    """
    words = np.ascontiguousarray(blocks).view(np.uint64).reshape(-1, 2)
    flat = np.ascontiguousarray(scales).reshape(-1)
    if jit.kernels() is not None:
        from gptoss_convert.codecs.mxfp4 import sum_kernels

        zero, low = sum_kernels.count_blocks(words)
    else:
        # A nibble is sign and code: 0x7 are the bits of its magnitude, and codes 6 and 7, for 4 and
        # 6, are those with the two upper ones set.
        nonzero = ((words & np.uint64(0x7777777777777777)) != 0).any(axis=1)
        high = (words >> np.uint64(1)) & (words >> np.uint64(2)) & np.uint64(0x1111111111111111)
        zero = int(np.count_nonzero(~nonzero))
        low = int(np.count_nonzero(nonzero & (high == 0).all(axis=1)))
    return ScaleStatistics(
        math.prod(scales.shape), int(zero), int(low), int(flat.min()), int(flat.max())
    )

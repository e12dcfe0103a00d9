"""Sums over MXFP4 blocks that store no decoded values: fingerprints, and statistics of scales."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs.mxfp4 import library
from gptoss_convert.codecs.mxfp4.codec import refuse_overflow
from gptoss_convert.codecs.mxfp4.library import address, numbers
from gptoss_convert.codecs.mxfp4.reference import U8
from gptoss_convert.codecs.stats import ScaleStatistics

U64 = npt.NDArray[np.uint64]
_MASK = (1 << 64) - 1


def weighted_sum(blocks: U8, scales: U8, weights: Sequence[U64]) -> int | None:
    """Σ bits·Πw modulo 2^64 over the BF16 values of blocks (*rows, groups, 16) with their scales
    (*rows, groups), w one of `weights` per axis of the values; None without compiled kernels.

    Raises CodecError for the first block that has no finite BF16 value.
    """
    refuse_overflow(blocks, scales)
    kernels = library.load()
    if kernels is None or blocks.strides[-1] != 1:
        return None
    block_rows, scale_rows = np.zeros(1, np.int64), np.zeros(1, np.int64)
    rows, scale = np.ones(1, np.uint64), 1
    *row_weights, columns = weights
    for axis, weight in enumerate(row_weights):
        if len(weight) == 1:
            scale *= int(weight[0])
            continue
        at = np.arange(len(weight))
        block_rows = np.add.outer(block_rows, blocks.strides[axis] * at).ravel()
        scale_rows = np.add.outer(scale_rows, scales.strides[axis] * at).ravel()
        rows = np.multiply.outer(rows, weight).ravel()
    columns = np.ascontiguousarray(columns)
    group = numbers((blocks.strides[-2], scales.strides[-1]))
    starts = map(address, (blocks, scales, block_rows, scale_rows, rows))
    total = kernels.packed_sum(*starts, rows.size, group, address(columns), scales.shape[-1])
    return total * scale & _MASK


def scale_statistics(blocks: U8, scales: U8) -> ScaleStatistics:
    """Count blocks (*rows, groups, 16) with their scales (*rows, groups), by what they hold.

    Of the other blocks than those of zeros, low ones hold no magnitude above 3.
    """
    blocks = np.ascontiguousarray(blocks)
    if kernels := library.load():
        counts = numbers((0, 0))
        kernels.count_blocks(address(blocks), scales.size, counts)
        zero, low = counts
    else:
        # A nibble is sign and code: 0x7 are the bits of its magnitude, and codes 6 and 7, for 4 and
        # 6, are those with the two upper ones set.
        words = blocks.view(np.uint64).reshape(-1, 2)
        nonzero = ((words & np.uint64(0x7777777777777777)) != 0).any(axis=1)
        high = (words >> np.uint64(1)) & (words >> np.uint64(2)) & np.uint64(0x1111111111111111)
        zero = int(np.count_nonzero(~nonzero))
        low = int(np.count_nonzero(nonzero & (high == 0).all(axis=1)))
    return ScaleStatistics(scales.size, zero, low, int(scales.min()), int(scales.max()))


def count_bytes(held: U8) -> npt.NDArray[np.int64]:
    """How often each of the 256 bytes occurs in an array, which may be a view, of below 2^32."""
    held = np.ascontiguousarray(held)
    if kernels := library.load():
        counts = np.empty(256, np.int64)
        kernels.count_bytes(address(held), held.size, address(counts))
        return counts
    return np.bincount(held.reshape(-1), minlength=256)

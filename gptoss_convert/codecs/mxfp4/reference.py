"""The codec in numpy: the arithmetic that the compiled kernels must reproduce bit by bit.

Blocks are 16 bytes, two E2M1 codes each, low nibble first; 32 values share one E8M0 scale byte
(OCP Microscaling Formats 1.0, 5.3 and 5.4). BF16 values are carried as their bits, in uint16.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.codecs.stats import EncodeStats

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]
F64 = NDArray[np.float64]

GRID: F64 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
"""The magnitudes of the E2M1 codes 0..7."""

MAX_SCALE = 252
"""The largest scale byte under which every code is a finite BF16 number."""

NO_HINT = 255
"""The E8M0 byte for NaN, hence never a scale that a block could have."""


def bf16_bits(values: NDArray[np.float32]) -> U16:
    """BF16 bits of `values`, rounded to nearest even; NaN stays NaN, overflow is an infinity."""
    bits = values.view(np.uint32)
    # BF16 is the upper half of float32. Adding just under half of its last place, and one more if
    # that place is odd, carries into it exactly where nearest-even rounds up; the same carry makes
    # an infinity of what overflows. A NaN could carry too: it is cut off, and kept a NaN by 0x40.
    rounded = (bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16
    nan = (bits & 0x7FFFFFFF) > 0x7F800000
    return np.where(nan, (bits >> 16) | 0x40, rounded).astype(np.uint16)


@functools.cache
def _byte_pairs() -> NDArray[np.uint32]:
    """[scale * 256 + byte] -> the byte's two values: low nibble in the low half. 256 KiB."""
    codes = np.concatenate([GRID, -GRID])
    with np.errstate(over="ignore"):
        values = np.ldexp(codes, np.arange(256)[:, None] - 127).astype(np.float32)
    bits = bf16_bits(values)
    pairs = np.empty((256, 16, 16, 2), np.uint16)
    pairs[..., 0] = bits[:, None, :]
    pairs[..., 1] = bits[:, :, None]
    return pairs.view("<u4").reshape(-1).astype(np.uint32)


def decode_blocks(blocks: U8, scales: U8) -> U16:
    """BF16 bits (..., 32) of blocks (..., 16) and scales (...); exact wherever BF16 is finite."""
    index = (scales.astype(np.uint16)[..., None] << 8) | blocks
    return _byte_pairs()[index].view(np.uint16)


def encode_blocks(values: U16, hints: U8) -> tuple[U8, U8, EncodeStats]:
    """Blocks (..., 16), scales (...) and statistics of BF16 bits (..., 32) with hints (...).

    The scale is 2^(floor(log2 amax) - 2), amax the largest finite magnitude, as a byte within
    0..252, and 0 for a block of zeros; a hint replaces it iff every value is exact under the hint.
    Elements are rounded to nearest even and saturated.
    """
    finite = (values & 0x7FFF) < 0x7F80
    magnitude = ((values & 0x7FFF).astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    magnitude[~finite] = np.inf
    amax = np.max(np.where(finite, magnitude, 0.0), axis=-1)
    zero = (amax == 0) & finite.all(axis=-1)
    # frexp counts from 1/2, so its exponent is floor(log2 amax) + 1; then - 2, and E8M0's bias 127.
    rule = np.where(amax == 0, 0, np.clip(np.frexp(amax)[1] + 124, 0, MAX_SCALE)).astype(np.uint8)
    hinted = (hints != rule) & (hints <= np.where(zero, MAX_SCALE, NO_HINT - 1))
    if hinted.any():
        hinted &= _exact(magnitude, hints)
    scales = np.where(hinted, hints, rule)
    ratio = _ratio(magnitude, scales)
    codes = _nearest(ratio)
    error = np.where(finite, np.abs(GRID[codes] - ratio), np.inf)
    stats = _stats(magnitude, scales, ratio, codes, error, zero)
    # The sign goes from bit 15 of BF16 to bit 3 of a code; of two codes the first is the low one.
    signed: U8 = codes | ((values >> 12) & 8).astype(np.uint8)
    blocks: U8 = (signed[..., 0::2] | (signed[..., 1::2] << 4)).astype(np.uint8)
    return blocks, scales, stats + EncodeStats(hinted_blocks=int(np.count_nonzero(hinted)))


def _ratio(magnitude: F64, scales: U8) -> F64:
    """Magnitudes over their block's scale: exact in float64."""
    return np.ldexp(magnitude, 127 - scales.astype(np.int32)[..., None])


def _nearest(ratio: F64) -> U8:
    """The E2M1 code next to each ratio, even on ties, 7 beyond."""
    step = np.where(ratio < 2, 0.5, np.where(ratio < 4, 1.0, 2.0))
    rounded = np.rint(np.minimum(ratio, 8.0) / step) * step
    return np.searchsorted(GRID, np.minimum(rounded, 6.0)).astype(np.uint8)


def _exact(magnitude: F64, scales: U8) -> NDArray[np.bool_]:
    ratio = _ratio(magnitude, scales)
    return (GRID[_nearest(ratio)] == ratio).all(axis=-1)


def _stats(
    magnitude: F64, scales: U8, ratio: F64, codes: U8, error: F64, zero: NDArray[np.bool_]
) -> EncodeStats:
    finite = np.isfinite(magnitude)
    inexact = (error != 0).any(axis=-1)
    absolute = np.ldexp(np.where(finite, error, 0.0), scales.astype(np.int32)[..., None] - 127)
    nonzero_scales = scales[~zero]
    return EncodeStats(
        blocks=scales.size,
        inexact_blocks=int(np.count_nonzero(inexact)),
        inexact_values=int(np.count_nonzero(error)),
        nonfinite=int(np.count_nonzero(~finite)),
        clipped=int(np.count_nonzero(finite & (ratio > 6))),
        flushed=int(np.count_nonzero((codes == 0) & (ratio > 0))),
        zero_blocks=int(np.count_nonzero(zero)),
        min_scale=int(nonzero_scales.min(initial=255)),
        max_scale=int(nonzero_scales.max(initial=0)),
        squares=float(np.sum(np.square(np.where(finite, magnitude, 0.0)[inexact]))),
        squared_error=float(np.sum(np.square(absolute))),
        max_abs_error=float(absolute.max(initial=0.0)),
        first_inexact=int(np.argmax(inexact)) if inexact.any() else -1,
    )

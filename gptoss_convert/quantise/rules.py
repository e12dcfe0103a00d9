"""Rules that round blocks MXFP4 cannot hold exactly: which scale, and which of two neighbours.

*Nearest* takes the code next to each value. That undoes a fine-tune: neighbouring codes are a
quarter to a half of a value apart, an update is a few percent, so nearly every code is the base's.
*Stochastic* takes one of the two neighbours at random, the nearer one more often, so that the
expected value is the value itself: of an update of 3 % of a step, 3 % of the codes flip, and sums
over a row carry it. What is random is drawn from the block's own bits: the same values give the
same bytes, however a conversion is cut up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.codecs.mxfp4.reference import MAX_SCALE, U8, U16

F32 = NDArray[np.float32]
I32 = NDArray[np.int32]
U32 = NDArray[np.uint32]

Rule = Literal["best", "floor", "ceil", "even", "stochastic"]
RULES: tuple[Rule, ...] = ("best", "floor", "ceil", "even")
"""How nearest rounding chooses the scale of a block; see `candidates`."""

BIAS = 127
"""The E8M0 byte of scale 1."""


def round_blocks(values: U16, hints: U8, rule: Rule) -> tuple[U8, U8]:
    """Codes (n, 32), sign in bit 3, and scales (n) for BF16 bits (n, 32), all finite.

    A hint up to 252 is the scale that the block had before it was changed.
    """
    magnitudes = ((values & 0x7FFF).astype(np.uint32) << 16).view(np.float32)
    exponents = candidates(magnitudes.max(axis=1), hints, rule)
    tables = _tables()
    costs = tables.expected_error if rule == "stochastic" else tables.squared_error
    chosen, ratios = _least(magnitudes, exponents, costs)
    if rule == "stochastic":
        codes = tables.lower[ratios] + (thresholds(values) < tables.share[ratios])
    else:
        codes = tables.nearest[ratios]
    signs = ((values >> 12) & 8).astype(np.uint8)
    return codes | signs, (chosen + BIAS).astype(np.uint8)


def nearest_codes(values: U16, scales: U8) -> U8:
    """The codes (n, 32), without signs, next to BF16 bits (n, 32) at given scales (n)."""
    magnitudes = ((values & 0x7FFF).astype(np.uint32) << 16).view(np.float32)
    return _tables().nearest[_ratios(magnitudes, scales.astype(np.int32) - BIAS)]


def candidates(largest: F32, hints: U8, rule: Rule) -> list[I32]:
    """Exponents of the scales (n) that a rule considers; of equally good ones the first is taken.

    With m the largest magnitude: `floor` is ⌊log2 m⌋ - 2, OCP MX 1.0's, which clips up to a
    quarter of m; `ceil` is ⌈log2(m / 6)⌉, which never clips; `even` is the floor, plus 1 where m
    would be clipped to less than 7/8. The others weigh the hint, floor and floor + 1.
    """
    mantissa, exponent = np.frexp(largest)
    floor = np.where(largest == 0, -BIAS, exponent - 3).astype(np.int32)
    if rule == "floor":
        found = [floor]
    elif rule == "ceil":
        found = [floor + (mantissa > 0.75)]
    elif rule == "even":
        found = [floor + (mantissa >= 0.875)]
    else:
        hinted = np.where(hints <= MAX_SCALE, hints.astype(np.int32) - BIAS, floor)
        found = [hinted, floor, floor + 1]
    return [np.clip(one, -BIAS, MAX_SCALE - BIAS).astype(np.int32) for one in found]


def _least(magnitudes: F32, exponents: list[I32], costs: F32) -> tuple[I32, U16]:
    """Of several exponents per block the one of the least total cost, the first among equals; and
    the ratios to it, as BF16 bits. `costs` are by ratio, in units of the scale's square."""
    ratios = [_ratios(magnitudes, one) for one in exponents]
    if len(exponents) == 1:
        return exponents[0], ratios[0]
    totals = [
        np.ldexp(costs[ratio].sum(axis=1, dtype=np.float64), 2 * exponent)
        for ratio, exponent in zip(ratios, exponents, strict=True)
    ]
    chosen = np.argmin(totals, axis=0)
    blocks = np.arange(chosen.size)
    return np.stack(exponents)[chosen, blocks], np.stack(ratios)[chosen, blocks]


def _ratios(magnitudes: F32, exponents: I32) -> U16:
    """Magnitudes over their block's scale, as BF16 bits: exact, an infinity if beyond."""
    with np.errstate(over="ignore"):
        scaled = magnitudes * np.ldexp(np.float32(1), -exponents)[:, None]
    return (scaled.view(np.uint32) >> np.uint32(16)).astype(np.uint16)


GRID: F32 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
"""The magnitudes of the E2M1 codes 0..7."""


@dataclass(frozen=True)
class _Tables:
    """By the BF16 bits of a magnitude in units of its scale."""

    nearest: U8
    """The code next to it, even on ties, 7 beyond."""
    squared_error: F32
    """(value - nearest)²."""
    lower: U8
    """The code at or below it, 7 beyond."""
    share: F32
    """How far it is on the way to the next code, 0 beyond."""
    expected_error: F32
    """E (value - rounded)² under stochastic rounding, clipping included."""


@cache
def _tables() -> _Tables:
    bits = np.minimum(np.arange(1 << 15, dtype=np.uint32), np.uint32(0x7F80))  # No ratio is NaN.
    # So large a square decides against a scale, and is finite.
    values = np.minimum((bits << np.uint32(16)).view(np.float32), 1e15).astype(np.float64)
    inside = np.minimum(values, 6.0)
    step = np.where(inside < 2, 0.5, np.where(inside < 4, 1.0, 2.0))
    nearest = np.searchsorted(GRID, np.rint(inside / step) * step)
    lower = np.searchsorted(GRID, inside, side="right") - 1
    share = (inside - GRID[lower]) / step
    return _Tables(
        nearest.astype(np.uint8),
        np.square(values - GRID[nearest]).astype(np.float32),
        lower.astype(np.uint8),
        share.astype(np.float32),
        (step**2 * share * (1 - share) + np.square(values - inside)).astype(np.float32),
    )


def thresholds(values: U16) -> F32:
    """Uniform numbers in (0, 1), (n, 32): a hash of each block's bits and the place in the block.

    Steps of 2^-24; murmur3's finalizer mixes (Appleby 2011).
    """
    words = np.ascontiguousarray(values).view(np.uint32)
    seed = np.zeros(len(words), np.uint32)
    for column in range(words.shape[1]):
        seed = mixed(seed ^ words[:, column])
    places = np.arange(values.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B9)
    drawn = mixed(seed[:, None] + places) >> np.uint32(8)
    return (drawn.astype(np.float32) + np.float32(0.5)) * np.float32(2.0**-24)


def mixed(bits: U32) -> U32:
    """Every bit of 32 spread over all: murmur3's 32-bit finalizer."""
    bits = (bits ^ (bits >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    bits = (bits ^ (bits >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return bits ^ (bits >> np.uint32(16))

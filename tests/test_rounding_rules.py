"""Rules that round to MXFP4, against the same written out in plain Python, one value at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest

from gptoss_convert.codecs.mxfp4 import CODEC
from gptoss_convert.codecs.mxfp4.reference import (
    NO_HINT,
    bf16_bits,
    decode_blocks,
    encode_blocks,
)
from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.quantise.rounding import Ruled
from gptoss_convert.quantise.rules import (
    RULES,
    nearest_codes,
    round_blocks,
    thresholds,
)

GRID = [Fraction(n, 2) for n in (0, 1, 2, 3, 4, 6, 8, 12)]


def floats(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def blocks(count: int, seed: int = 0, spread: float = 3.0) -> np.ndarray:
    """BF16 bits (count, 32) whose largest magnitudes cover all mantissas and many exponents."""
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 32)) * np.exp2(rng.normal(0, spread, (count, 1)))
    return bf16_bits(values.astype(np.float32))


def no_hints(count: int) -> np.ndarray:
    return np.full(count, NO_HINT, np.uint8)


def values_of(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    packed = (codes[:, 0::2] | (codes[:, 1::2] << 4)).astype(np.uint8)
    return floats(decode_blocks(packed, scales))


def nearest(magnitude: Fraction) -> Fraction:
    """The grid point next to a magnitude, of two equally near the one of the even code."""
    return min(GRID, key=lambda point: (abs(point - magnitude), GRID.index(point) % 2))


def exponent(rule: str, largest: Fraction) -> int:
    """The rule as docs/mxfp4.md states it."""
    power = math.floor(math.log2(largest))
    if rule == "floor":
        return power - 2
    if rule == "ceil":
        return next(n for n in range(power - 4, power + 4) if largest <= 6 * Fraction(2) ** n)
    return power - 2 + (largest / Fraction(2) ** power >= Fraction(7, 4))


@pytest.mark.parametrize("rule", ["floor", "ceil", "even"])
def test_scale_and_codes_are_those_of_the_rule_stated_in_fractions(rule: str):
    bits = blocks(64)
    codes, scales = round_blocks(bits, no_hints(64), rule)  # pyright: ignore[reportArgumentType]
    for block, row, scale in zip(floats(bits), codes, scales, strict=True):
        exact = [Fraction(float(value)) for value in block]
        expected = exponent(rule, max(map(abs, exact)))
        assert int(scale) - 127 == expected
        unit = Fraction(2) ** expected
        points = [nearest(abs(value) / unit) for value in exact]
        assert [GRID[code & 7] for code in row.tolist()] == points
        assert [code >> 3 for code in row.tolist()] == [value < 0 for value in exact]


def test_best_has_the_least_error_of_its_candidates_and_keeps_a_hint_that_is_as_good():
    bits = blocks(256)
    _, floor = round_blocks(bits, no_hints(256), "floor")
    hints = (floor + np.random.default_rng(1).integers(-1, 3, 256)).astype(np.uint8)
    codes, scales = round_blocks(bits, hints, "best")

    def error(scale: np.ndarray) -> np.ndarray:
        signs = ((bits >> 12) & 8).astype(np.uint8)
        made = values_of(nearest_codes(bits, scale) | signs, scale).astype(np.float64)
        return np.square(made - floats(bits)).sum(axis=1)

    errors = np.stack([error(one) for one in (hints, floor, (floor + 1).astype(np.uint8))])
    found = np.square(values_of(codes, scales).astype(np.float64) - floats(bits)).sum(axis=1)
    np.testing.assert_array_equal(found, errors.min(axis=0))
    assert (scales[errors[0] == errors.min(axis=0)] == hints[errors[0] == errors.min(axis=0)]).all()
    assert len(np.unique(errors.argmin(axis=0))) == 3


def test_the_floor_rule_is_the_codecs_own_rounding():
    bits = blocks(512)
    codes, scales = round_blocks(bits, no_hints(512), "floor")
    packed, expected, _ = encode_blocks(bits, no_hints(512))
    np.testing.assert_array_equal(codes[:, 0::2] | (codes[:, 1::2] << 4), packed)
    np.testing.assert_array_equal(scales, expected)


def test_stochastic_rounding_is_right_on_average_and_never_leaves_the_neighbours():
    rng = np.random.default_rng(0)
    # Half of each block is the same in all, the other half makes every block's draws its own.
    values = rng.uniform(-6, 6, (40_000, 32)).astype(np.float32)
    values[:, :16] = np.linspace(-5.9, 5.9, 16)
    bits = bf16_bits(values)
    codes, scales = round_blocks(bits, np.full(40_000, 127, np.uint8), "stochastic")
    assert (scales == 127).all()
    made, wanted = values_of(codes, scales)[:, :16], floats(bits)[:, :16]
    step = np.where(np.abs(wanted[0]) < 2, 0.5, np.where(np.abs(wanted[0]) < 4, 1, 2))
    assert (np.abs(made - wanted) < step).all()
    deviation = np.abs(made.mean(axis=0) - wanted[0])
    assert (deviation < 5 * step / 2 / np.sqrt(40_000)).all()
    assert (made.std(axis=0) > 0).all()


def test_draws_are_uniform_independent_and_a_function_of_the_block_alone():
    bits = blocks(4096)
    drawn = thresholds(bits).astype(np.float64)
    assert drawn.min() > 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.005 and abs(drawn.var() - 1 / 12) < 0.002
    correlation = np.corrcoef(drawn.T) - np.eye(32)
    assert np.abs(correlation).max() < 0.08
    np.testing.assert_array_equal(thresholds(bits[100:200]), drawn[100:200].astype(np.float32))
    other = bits.copy()
    other[:, 7] ^= 1
    assert (thresholds(other) != drawn.astype(np.float32)).mean() > 0.99


def test_an_update_is_lost_to_nearest_and_kept_by_stochastic_rounding():
    """Values on the grid, changed by a few percent of a step, as training leaves them."""
    rng = np.random.default_rng(2)
    scales = rng.integers(110, 130, 4096).astype(np.uint8)
    codes = np.clip(np.abs(rng.normal(0, 2.5, (4096, 32))).astype(np.uint8), 0, 6)
    base = values_of((codes | rng.integers(0, 2, codes.shape) * 8).astype(np.uint8), scales)
    unit = np.ldexp(1.0, scales.astype(np.int32) - 127)[:, None]
    bits = bf16_bits((base + unit * 0.02 * rng.normal(size=base.shape)).astype(np.float32))
    update = floats(bits) - base.astype(np.float64)

    def kept(rule: str) -> float:
        made = values_of(*round_blocks(bits, scales, rule))  # pyright: ignore[reportArgumentType]
        return float(((made - base) * update / unit**2).sum() / np.square(update / unit).sum())

    assert abs(kept("best")) < 0.01
    assert 0.9 < kept("stochastic") < 1.1


def encoded(
    rule: str, bits: np.ndarray, hints: np.ndarray
) -> tuple[np.ndarray, np.ndarray, EncodeStats]:
    parts = {"blocks": np.empty((len(bits), 16), np.uint8), "scales": np.empty(len(bits), np.uint8)}
    parts = {name: part[:, None] for name, part in parts.items()}
    codec = Ruled(CODEC, rule)  # pyright: ignore[reportArgumentType]
    stats = codec.encode(bits, parts, {"scales": hints[:, None]})
    return parts["blocks"][:, 0], parts["scales"][:, 0], stats


def mixed_blocks() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Blocks of which every other is exact, hints for them, and which are exact."""
    bits = blocks(200)
    packed, scales, _ = encode_blocks(bits, no_hints(200))
    exact = np.arange(200) % 2 == 0
    bits[exact] = decode_blocks(packed, scales)[exact]
    return bits, scales, exact


@pytest.mark.parametrize("rule", [*RULES, "stochastic"])
def test_exact_blocks_are_encoded_as_without_a_rule(rule: str):
    bits, hints, exact = mixed_blocks()
    made, scales, stats = encoded(rule, bits, hints)
    before, kept, _ = encode_blocks(bits, hints)
    np.testing.assert_array_equal(made[exact], before[exact])
    np.testing.assert_array_equal(scales[exact], kept[exact])
    assert stats.inexact_blocks == 100 and stats.blocks == 200 and stats.first_inexact == 1


@pytest.mark.parametrize("rule", [*RULES, "stochastic"])
def test_statistics_are_those_of_what_was_made(rule: str):
    bits, hints, _ = mixed_blocks()
    made, scales, stats = encoded(rule, bits, hints)
    wanted, got = floats(bits).astype(np.float64), floats(decode_blocks(made, scales))
    error = np.abs(wanted - got)
    bound = np.ldexp(6.0, scales.astype(np.int32) - 127)[:, None]
    assert stats.inexact_values == np.count_nonzero(error)
    assert stats.clipped == np.count_nonzero(np.abs(wanted) > bound)
    assert stats.flushed == np.count_nonzero((got == 0) & (wanted != 0))
    assert stats.max_abs_error == error.max()
    assert math.isclose(stats.squared_error, np.square(error).sum(), rel_tol=1e-12)
    assert (stats.min_scale, stats.max_scale) == (scales.min(), scales.max())
    assert stats.compared == 100 * 32 and 0 <= stats.flipped <= stats.compared


def cuts() -> Iterator[list[slice]]:
    yield [slice(0, 200)]
    yield [slice(0, 1), slice(1, 77), slice(77, 200)]


def test_the_bytes_do_not_depend_on_how_a_conversion_is_cut():
    bits, hints, _ = mixed_blocks()
    ways = [
        np.concatenate([encoded("stochastic", bits[part], hints[part])[0] for part in way])
        for way in cuts()
    ]
    np.testing.assert_array_equal(ways[0], ways[1])

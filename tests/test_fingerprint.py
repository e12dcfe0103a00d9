"""Fingerprints: the stated sum, in every layout and cut, and every change shows."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from gptoss_convert.codecs.mxfp4.sums import count_bytes, scale_statistics
from gptoss_convert.engine.fingerprint import axis_weights, examined, fingerprint
from gptoss_convert.layouts.layout import Box

LENGTHS = (2, 3, 4, 2, 160)
"""layer, expert, inter, glu, hidden: the last is longer than one vectorized piece."""
LAYER = 0
ONE_LAYER: Box = ((1, 2), (0, 3), (0, 4), (0, 2), (0, 160))
MASK = (1 << 64) - 1


def values() -> np.ndarray:
    return np.random.default_rng(5).integers(0, 1 << 16, (1, *LENGTHS[1:]), dtype=np.uint16)


def stated(bits: np.ndarray) -> int:
    """The definition, element by element, in Python's own integers."""
    weights = [axis_weights(axis, length).tolist() for axis, length in enumerate(LENGTHS)]
    total = 0
    for index in product(*map(range, bits.shape)):
        factors = (weights[axis][i] for axis, i in enumerate(index) if axis != LAYER)
        total += int(bits[index]) * math.prod(factors)
    return total & MASK


def taken(bits: np.ndarray, box: Box = ONE_LAYER) -> int:
    return fingerprint(bits, box, LENGTHS, LAYER)


@pytest.mark.parametrize(
    "order", [(0, 1, 2, 3, 4), (0, 1, 4, 2, 3), (0, 1, 3, 2, 4), (4, 3, 2, 1, 0)]
)
def test_every_layout_gives_the_stated_sum(order: tuple[int, ...]) -> None:
    bits = values()
    laid_out = np.ascontiguousarray(bits.transpose(order)).transpose(np.argsort(order))
    assert taken(laid_out) == stated(bits)


@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (0, 1, 4, 2, 3)])
@pytest.mark.parametrize("where", [0, 31, 32, 159])
@pytest.mark.parametrize("odd", [0x7F80, 0xFF80, 0x7FC1])
def test_an_infinity_or_nan_anywhere_is_seen(odd: int, where: int, order: tuple[int, ...]) -> None:
    bits = (values() & np.uint16(0xBFFF)).astype(np.uint16)  # no exponent of all ones
    laid_out = np.ascontiguousarray(bits.transpose(order)).transpose(np.argsort(order))
    assert examined(laid_out, ONE_LAYER, LENGTHS, LAYER) == (stated(bits), False)
    laid_out[0, 2, 3, 1, where] = odd
    assert examined(laid_out, ONE_LAYER, LENGTHS, LAYER)[1]


def test_the_parts_of_a_cut_add_up() -> None:
    bits = values()
    parts = [
        taken(
            bits[:, expert : expert + 1, lo:hi],
            (*ONE_LAYER[:1], (expert, expert + 1), (lo, hi), *ONE_LAYER[3:]),
        )
        for expert in range(3)
        for lo, hi in ((0, 1), (1, 4))
    ]
    assert sum(parts) & MASK == taken(bits)


@pytest.mark.parametrize("axis", [1, 2, 3, 4])
def test_reversing_any_axis_shows(axis: int) -> None:
    bits = values()
    assert taken(np.ascontiguousarray(np.flip(bits, axis))) != taken(bits)


@pytest.mark.parametrize("bit", range(16))
def test_one_flipped_bit_shows(bit: int) -> None:
    bits = values()
    before = taken(bits)
    bits[0, 2, 1, 1, 131] ^= 1 << bit
    assert taken(bits) != before


def test_blocks_are_counted_by_what_they_hold() -> None:
    blocks = np.zeros((1, 4, 16), np.uint8)
    blocks[0, 0, 3] = 0x80  # a negative zero: all values are zero still
    blocks[0, 1, 7] = 0x05  # 3.0: encoding anew picks another scale
    blocks[0, 2, 15] = 0x60  # 4.0
    blocks[0, 3, 0] = 0x0F  # -6.0
    found = scale_statistics(blocks, np.array([[9, 120, 121, 200]], np.uint8))
    assert (found.blocks, found.zero_blocks, found.low_blocks) == (4, 1, 1)
    assert (found.min_scale, found.max_scale) == (9, 200)


@pytest.mark.parametrize("kernels", ["numpy", ""])
def test_bytes_are_counted_one_by_one(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTOSS_CONVERT_KERNELS", kernels)
    held = np.random.default_rng(0).integers(0, 256, (3, 1001), dtype=np.uint8)
    held[0] = 7
    for view in (held, held[:, ::3], held[:, :5], held[:0]):
        expected = [int((view == byte).sum()) for byte in range(256)]
        assert count_bytes(view).tolist() == expected

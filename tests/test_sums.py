"""The arithmetic of a merge, by kernels and by numpy, against rational numbers and torch."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import pytest
import torch

from gptoss_convert.codecs.mxfp4 import library
from gptoss_convert.engine import sums

KINDS = ("normal", "many ties", "subnormal")
HARD = ("cancelling", "powers of two", "huge", "tiny halves")
"""What float32 cannot settle."""
SCALES = (Fraction(2), Fraction(16, 3), Fraction(1, 2**40), Fraction(0.7))


@pytest.fixture(params=["kernels", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "numpy":
        monkeypatch.setattr(library, "load", lambda: None)
    else:
        assert library.load() is not None, "the kernels were not built"
    return request.param


def operands(kind: str, seed: int) -> Iterator[tuple[sums.U16, sums.F32, sums.F32]]:
    """Weights and halves of a few sizes."""
    rng = np.random.default_rng(seed)
    for rows, columns, rank in ((1, 1, 1), (3, 300, 5), (7, 9, 4), (2, 257, 1), (35, 3, 2)):
        p, q = rng.standard_normal((rows, rank)), rng.standard_normal((rank, columns))
        weights = rng.standard_normal((rows, columns))
        if kind == "many ties":
            p, q = rng.integers(-4, 5, p.shape) / 8, rng.integers(-4, 5, q.shape) / 256
        if kind == "subnormal":
            p, q, weights = p * 1e-20, q * 1e-18, rng.integers(-3, 3, weights.shape) * 1e-39
        if kind == "cancelling":
            weights = -2 * (p @ q)
        if kind == "powers of two":
            p, q = p * 2.0**-8, q * 2.0**-8
            weights = np.exp2(rng.integers(-6, 3, weights.shape))
        if kind == "huge":
            p, q, weights = p * 2.0**60, q * 2.0**61, weights * 2.0**124
        if kind == "tiny halves":
            p, q, weights = p * 1e-25, q * 1e-20, weights * 1e-37
        yield sums.to_bf16(weights.astype(np.float32)), p.astype(np.float32), q.astype(np.float32)


@pytest.mark.parametrize(
    ("kind", "scale"),
    [*((kind, scale) for scale in SCALES for kind in KINDS), *((kind, SCALES[0]) for kind in HARD)],
    ids=str,
)
def test_a_sum_is_the_nearest_bf16_to_the_rational_sum(way: str, kind: str, scale: Fraction):
    for weights, p, q in operands(kind, 1):
        made = weights.copy()
        sums.add_exact(made, p, q, scale)
        for (x, y), bits in np.ndenumerate(made):
            pairs = zip(p[x], q[:, y], strict=True)
            total = sum(Fraction(float(a)) * Fraction(float(b)) for a, b in pairs)
            exact = value(int(weights[x, y])) + scale * total
            assert_nearest(exact, int(bits))


def value(bits: np.integer | int) -> Fraction:
    return Fraction(float(torch.tensor([int(bits)], dtype=torch.uint16).view(torch.bfloat16)[0]))


def assert_nearest(exact: Fraction, bits: int) -> None:
    """No neighbour is nearer, and of two that are equally near the even one is taken."""
    error = abs(value(bits) - exact)
    for other in (bits - 1, bits + 1):
        if 0 <= other & 0x7FFF < 0x7F80 and other >> 15 == bits >> 15 and other >= 0:
            rival = abs(value(other) - exact)
            assert error < rival or (error == rival and bits % 2 == 0)


def test_what_nothing_is_added_to_keeps_its_bits(way: str):
    weights = np.array([[0x8000, 0x0000, 0x8001, 0x7F7F]], np.uint16)
    p, q = np.zeros((1, 2), np.float32), np.ones((2, 4), np.float32)
    made = weights.copy()
    sums.add_exact(made, p, q, Fraction(3))
    assert (made == weights).all()


@pytest.mark.parametrize("rank", [1, 5, 16, 192])
@pytest.mark.parametrize("twice", [False, True])
def test_peft_arithmetic_is_that_of_torch(way: str, rank: int, twice: bool):
    gen = torch.Generator().manual_seed(rank)
    b, a = torch.randn(70, rank, generator=gen), torch.randn(rank, 300, generator=gen)
    weights = torch.randn(70, 300, generator=gen).bfloat16()
    update = (b @ a) * (16 / 12)
    update = update.bfloat16() if twice else update
    expected = (weights.float() + update.float()).bfloat16()
    made = weights.view(torch.int16).numpy().copy().view(np.uint16)
    sums.add_as_peft(made, b.numpy(), a.numpy(), Fraction(16, 12), twice)
    assert torch.equal(torch.from_numpy(made.view(np.int16)), expected.view(torch.int16))


@pytest.mark.parametrize("order", ["C", "F"])
def test_strides_do_not_matter(way: str, order: str):
    (*_, (weights, p, q)) = operands("normal", 3)
    straight = weights.copy()
    sums.add_exact(straight, p, q, Fraction(2))
    room = np.zeros((2 * len(weights), 3 * weights.shape[1]), np.uint16, order)  # pyright: ignore
    view = room[::2, ::3]
    view[...] = weights
    sums.add_exact(view, p, q, Fraction(2))
    assert (view == straight).all()
    assert not room[1::2].any()

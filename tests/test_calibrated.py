"""Calibrated rounding against the same in plain float64 loops, and at its edges."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gptoss_convert.codecs import mxfp4
from gptoss_convert.quantise import matrices
from gptoss_convert.quantise.calibrated import DAMPING, FADE, Moments, draw, nearest, round_matrices
from gptoss_convert.quantise.matrices import BLOCK, Rounded, exact_form, packed, unpacked

EXPERTS, COLUMNS, ROWS, TOKENS = 3, 96, 20, 400
POINTS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def on_grid(seed: int = 0) -> tuple[Rounded, Tensor]:
    """Matrices that MXFP4 holds, largest codes 4 and 6, and their values."""
    gen = torch.Generator().manual_seed(seed)
    codes = (
        torch.randint(0, 8, (EXPERTS, COLUMNS, ROWS), generator=gen).sqrt().mul(2.6).to(torch.uint8)
    )
    signs = torch.randint(0, 2, codes.shape, generator=gen, dtype=torch.uint8) << 3
    scales = torch.randint(118, 124, (EXPERTS, COLUMNS // BLOCK, ROWS), generator=gen)
    rounded = Rounded(codes | signs, scales.to(torch.uint8))
    return rounded, rounded.values(torch.float32)


def inputs(seed: int = 1, tokens: int = TOKENS) -> Tensor:
    """Correlated inputs with a mean, as activations are, [E, T, K]."""
    always = torch.Generator().manual_seed(11)
    mix = torch.randn(COLUMNS, COLUMNS, generator=always) * 0.2
    mean = torch.randn(COLUMNS, generator=always)
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(EXPERTS, tokens, COLUMNS, generator=gen) @ mix + mean


def tuned(base: Tensor, x: Tensor, seed: int = 2) -> Tensor:
    """An update in the span of the inputs, as training makes it: 1 % of the weights' norm."""
    gen = torch.Generator().manual_seed(seed)
    update = x.transpose(1, 2) @ torch.randn(EXPERTS, x.shape[1], ROWS, generator=gen)
    return base + update * (0.01 * base.norm() / update.norm())


def moments_of(x: Tensor, weights: Tensor, tokens: int = TOKENS) -> Moments:
    products = x.transpose(1, 2) @ x
    return Moments(products, products @ weights, torch.full((len(x),), tokens))


def seeds() -> Tensor:
    return torch.arange(EXPERTS) + 7


def kept(made: Tensor, base: Tensor, weights: Tensor, x: Tensor) -> float:
    update, change = x @ (weights - base), x @ (made - base)
    return float((update * change).sum() / update.square().sum())


def reference(
    weights: np.ndarray, h: np.ndarray, y: np.ndarray, n: int, hints: np.ndarray, seed: int
):
    """One expert in float64, value by value: the module's docstring, spelled out."""
    columns, rows = weights.shape
    damped = h + np.eye(columns) * DAMPING * (1 + columns / n) * np.diag(h).mean()
    wanted = weights + np.linalg.solve(damped, y - h @ weights)
    scales = np.zeros((columns // BLOCK, rows), np.int64)
    for b in range(columns // BLOCK):
        for r in range(rows):
            part = wanted[b * BLOCK : (b + 1) * BLOCK, r]
            weight = np.diag(damped)[b * BLOCK : (b + 1) * BLOCK]
            floor = math.floor(math.log2(np.abs(part).max())) - 2 + 127
            costs = {}
            for byte in (int(hints[b, r]), floor, floor + 1):
                pairs = zip(part, weight, strict=True)
                costs.setdefault(byte, sum(w * expected(abs(v), byte) for v, w in pairs))
            scales[b, r] = min(costs, key=lambda byte: costs[byte])
    order = sorted(range(columns), key=lambda k: -np.diag(damped)[k])
    ordered = damped[np.ix_(order, order)]
    upper = np.linalg.cholesky(ordered[::-1, ::-1])[::-1, ::-1]
    errors, codes = np.zeros((columns, rows)), np.zeros((columns, rows), np.uint8)
    draws = draw(torch.tensor([seed]), torch.tensor([order]), rows)[0].double().numpy()
    for place, k in enumerate(order):
        fed = upper[:place, place] @ errors[:place] / upper[place, place]
        scale = 2.0 ** (scales[k // BLOCK] - 127)
        ratios = (wanted[k] + fed) / scale
        steps = np.array([0.5 if abs(v) < 2 else 1.0 if abs(v) < 4 else 2.0 for v in ratios])
        scatter = np.mean((fed / scale / steps) ** 2)
        dither = math.sqrt(max(0.0, 1 - FADE * scatter))
        for r, ratio in enumerate(ratios):
            bound = min(abs(ratio), 6.0) / steps[r] + 0.5 + dither * (draws[place, r] - 0.5)
            point = math.floor(bound) * steps[r]
            codes[k, r] = POINTS.index(point) | (8 if ratio < 0 else 0)
            value = math.copysign(point, ratio) * scale[r]
            errors[place, r] = wanted[k, r] - value
    return codes, scales


def expected(magnitude: float, byte: int) -> float:
    """E (value - rounded)² of stochastic rounding at a scale."""
    scale = 2.0 ** (byte - 127)
    inside = min(magnitude / scale, 6.0)
    step = 0.5 if inside < 2 else 1.0 if inside < 4 else 2.0
    share = inside / step % 1
    return (step**2 * share * (1 - share) + (magnitude / scale - inside) ** 2) * scale**2


def test_float64_gives_the_reference_bit_for_bit_and_float32_is_no_worse():
    base, values = on_grid()
    x = inputs()
    weights = tuned(values, x)
    exact = moments_of(x.double(), weights.double())
    # What the layers before lost is to be made good: other outputs than the weights' own.
    exact = Moments(exact.inputs, exact.outputs * 1.01, exact.tokens)
    made = round_matrices(weights.double(), exact, base.scales, seeds())
    for e in range(EXPERTS):
        codes, scales = reference(
            weights[e].double().numpy(),
            exact.inputs[e].numpy(),
            exact.outputs[e].numpy(),
            TOKENS,
            base.scales[e].numpy(),
            int(seeds()[e]),
        )
        np.testing.assert_array_equal(made.codes[e].numpy(), codes)
        np.testing.assert_array_equal(made.scales[e].numpy(), scales)
    coarse = round_matrices(
        weights,
        Moments(exact.inputs.float(), exact.outputs.float(), exact.tokens),
        base.scales,
        seeds(),
    )
    errors = [(x @ (one.values(torch.float32) - weights)).norm() for one in (made, coarse)]
    assert errors[1] <= errors[0] * 1.02
    assert (coarse.codes == made.codes).float().mean() > 0.98


def test_an_update_is_kept_that_rounding_to_nearest_loses():
    base, values = on_grid()
    x, held_out = inputs(tokens=2000), inputs(seed=5)
    weights = tuned(values, x)
    made = round_matrices(weights, moments_of(x, weights, 2000), base.scales, seeds())
    assert abs(kept(nearest(weights, base.scales), values, weights, held_out)) < 0.4
    assert 0.8 < kept(made.values(torch.float32), values, weights, held_out) < 1.1


def test_errors_are_fed_back_so_that_outputs_are_nearer_than_without():
    base, values = on_grid()
    x = inputs(tokens=2000)
    weights = tuned(values, x)
    fed = round_matrices(weights, moments_of(x, weights, 2000), base.scales, seeds())
    alone = round_matrices(weights, moments_of(x * 0, weights, 2000), base.scales, seeds())
    errors = [(x @ (one.values(torch.float32) - weights)).norm() for one in (fed, alone)]
    assert errors[0] < 0.8 * errors[1]


def test_what_the_layers_before_lost_is_made_good():
    """The wanted outputs are those of other inputs: half as large."""
    base, values = on_grid()
    x = inputs(tokens=2000)
    products = x.transpose(1, 2) @ x
    moments = Moments(products, 0.5 * products @ values, torch.full((EXPERTS,), 2000))
    made = round_matrices(values, moments, base.scales, seeds()).values(torch.float32)
    assert (x @ made - 0.5 * x @ values).norm() < 0.3 * (x @ values).norm()


@pytest.mark.parametrize("spoiled", ["nan", "inf", "empty", "cold", "none"])
def test_experts_without_usable_moments_are_rounded_each_value_for_itself(spoiled: str):
    base, values = on_grid()
    x = inputs()
    weights = tuned(values, x)
    good = moments_of(x, weights)
    tokens = good.tokens.clone()
    products, outputs = good.inputs.clone(), good.outputs.clone()
    if spoiled in ("nan", "inf"):
        products[1, 3, 5] = float(spoiled)
    elif spoiled == "empty":
        products[1], outputs[1] = 0, 0
    else:
        tokens[1] = 10 if spoiled == "cold" else 0
    made = round_matrices(weights, Moments(products, outputs, tokens), base.scales, seeds())
    whole = round_matrices(weights, good, base.scales, seeds())
    for e in (0, 2):
        assert torch.equal(made.codes[e], whole.codes[e])
    grid = made.values(torch.float32)[1]
    step = matrices.scale_values(made.scales[1], torch.float32).repeat_interleave(BLOCK, 0) * 2
    assert ((grid - weights[1]).abs() <= step).all()
    # Each value for itself: a change of one column changes no other.
    other = weights.clone()
    other[1, 5] *= 0.99
    again = round_matrices(other, Moments(products, outputs, tokens), base.scales, seeds())
    differ = (again.codes[1] != made.codes[1]).any(1)
    assert not differ[:5].any() and not differ[6:].any()


def test_a_singular_hessian_is_no_obstacle():
    """A single direction, met by many tokens; and twice the same column."""
    base, values = on_grid()
    line = torch.randn(1, 1, COLUMNS, generator=torch.Generator().manual_seed(3))
    x = line * torch.linspace(0.5, 1.5, 200).view(1, -1, 1).expand(EXPERTS, -1, 1)
    weights = tuned(values, x)
    made = round_matrices(weights, moments_of(x, weights, 200), base.scales, seeds())
    change, update = x @ (made.values(torch.float32) - values), x @ (weights - values)
    assert (change - update).norm() < 0.5 * update.norm()
    twice = inputs()
    twice[..., 1] = twice[..., 0]
    assert (
        round_matrices(weights, moments_of(twice, weights), base.scales, seeds()).codes.max() < 16
    )


def test_a_single_token_counts_as_too_few():
    base, values = on_grid()
    x = inputs(tokens=1)
    one = round_matrices(values * 1.01, moments_of(x, values, 1), base.scales, seeds())
    none = round_matrices(values * 1.01, moments_of(x * 0, values, 0), base.scales, seeds())
    assert torch.equal(one.codes, none.codes) and torch.equal(one.scales, none.scales)


def test_the_same_call_gives_the_same_bits_and_another_seed_others():
    base, values = on_grid()
    x = inputs()
    weights = tuned(values, x)
    runs = [round_matrices(weights, moments_of(x, weights), base.scales, seeds()) for _ in range(2)]
    assert torch.equal(runs[0].codes, runs[1].codes)
    other = round_matrices(weights, moments_of(x, weights), base.scales, seeds() + 1)
    assert not torch.equal(runs[0].codes, other.codes)


def test_an_expert_is_rounded_alike_in_any_company():
    base, values = on_grid()
    x = inputs()
    weights = tuned(values, x)
    whole = round_matrices(
        weights.double(), moments_of(x.double(), weights.double()), base.scales, seeds()
    )
    alone = round_matrices(
        weights[1:2].double(),
        moments_of(x[1:2].double(), weights[1:2].double()),
        base.scales[1:2],
        seeds()[1:2],
    )
    assert torch.equal(whole.codes[1], alone.codes[0])


@pytest.mark.parametrize("hinted", [False, True])
def test_exact_matrices_get_the_bytes_that_the_codec_gives_them(hinted: bool):
    _, values = on_grid()
    values[0, :BLOCK, 0] = 0
    values[0, 3, 0] = -0.0
    gen = torch.Generator().manual_seed(4)
    hints = torch.randint(114, 126, (EXPERTS, COLUMNS // BLOCK, ROWS), generator=gen).to(
        torch.uint8
    )
    changed = values.clone()
    changed[1, 40, 2] *= 1.01
    made, exact = exact_form(changed, hints if hinted else None)
    assert exact.tolist() == [True, False, True]
    stored = packed(made)
    bits = (
        values.transpose(1, 2)
        .contiguous()
        .to(torch.bfloat16)
        .view(torch.int16)
        .numpy()
        .view(np.uint16)
    )
    blocks = np.empty(tuple(stored.blocks.shape), np.uint8)
    scales = np.empty(tuple(stored.scales.shape), np.uint8)
    former = {"scales": hints.transpose(1, 2).contiguous().numpy()} if hinted else {}
    stats = mxfp4.CODEC.encode(bits, {"blocks": blocks, "scales": scales}, former)
    assert stats.inexact_blocks == 0 and (stats.hinted_blocks > 0) == hinted
    for e in (0, 2):
        np.testing.assert_array_equal(stored.blocks[e].numpy(), blocks[e])
        np.testing.assert_array_equal(stored.scales[e].numpy(), scales[e])


def test_packing_is_what_the_witness_decodes():
    rounded, values = on_grid()
    stored = packed(rounded)
    assert torch.equal(stored.decode(torch.float32), values.transpose(1, 2))
    back = unpacked(stored)
    assert torch.equal(back.codes, rounded.codes) and torch.equal(back.scales, rounded.scales)


def test_draws_are_uniform_and_differ_by_seed_column_and_row():
    drawn = draw(torch.arange(4), torch.arange(64).expand(4, 64), 256).double()
    assert drawn.min() > 0 and drawn.max() < 1
    assert abs(drawn.mean() - 0.5) < 0.005 and abs(drawn.var() - 1 / 12) < 0.002
    assert len(drawn.unique()) > 0.99 * drawn.numel()
    flat = drawn.flatten(1)
    assert np.abs(np.corrcoef(flat.numpy()) - np.eye(4)).max() < 0.03

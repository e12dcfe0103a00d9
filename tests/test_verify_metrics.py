from __future__ import annotations

import math
from dataclasses import fields

import torch

from gptoss_convert.witness.limits import load_limits, violations
from gptoss_convert.witness.metrics import (
    KlRange,
    TokenScores,
    divergence,
    joined,
    kl_ranges,
    quantile,
    same_choices,
    score,
    summary,
)

DOUBT = 5e-5


def random_logits(seed: int, vocab: int = 40000) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(6, vocab, generator=gen) * 3


def following(logits: torch.Tensor) -> torch.Tensor:
    return torch.tensor([5, 39999, 7, 0, 20000, -1])[: len(logits)]


def test_scores_agree_with_their_definitions() -> None:
    source, target = random_logits(0), random_logits(0) + 0.1 * random_logits(1)
    scores = score(source, target, following(source))
    p, q = source.double().log_softmax(1), target.double().log_softmax(1)
    assert torch.allclose(scores.kl, (p.exp() * (p - q)).sum(1), rtol=1e-10)
    assert torch.equal(scores.max_delta, (source.double() - target.double()).abs().amax(1))
    assert torch.allclose(scores.mean_delta, (source.double() - target.double()).abs().mean(1))
    assert torch.equal(scores.top1.bool(), source.argmax(1) == target.argmax(1))
    expected = [
        len(set(a.tolist()) & set(b.tolist())) / 5
        for a, b in zip(source.topk(5).indices, target.topk(5).indices, strict=True)
    ]
    assert torch.allclose(scores.top5, torch.tensor(expected, dtype=torch.float64))
    assert torch.allclose(scores.source_nll[:5], -p[range(5), following(source)[:5]])
    assert torch.allclose(scores.target_nll[:5], -q[range(5), following(source)[:5]])
    assert scores.source_nll[5].isnan()


def test_identical_logits_give_exact_zeros() -> None:
    source = random_logits(2) * 10
    scores = score(source, source.clone(), following(source))
    found = summary(scores, torch.ones(6, dtype=torch.bool), DOUBT)
    assert (found.kl_max, found.max_delta, found.mean_delta) == (0, 0, 0)
    assert (found.top1, found.top1_decisive, found.top5) == (1, 1, 1)
    assert found.perplexity_difference == 0


def test_joined_parts_equal_the_whole() -> None:
    source, target = random_logits(0), random_logits(1)
    whole = score(source, target, following(source))
    parts = zip(source.split(4), target.split(4), following(source).split(4), strict=True)
    together = joined([score(*part) for part in parts])
    for f in fields(TokenScores):
        expected, found = getattr(whole, f.name), getattr(together, f.name)
        assert torch.allclose(expected, found, rtol=1e-12, equal_nan=True), f.name


def test_doubtful_positions_do_not_count_as_decisive() -> None:
    source = torch.zeros(2, 8)
    source[0, 0], source[1, 0], source[1, 1] = 5.0, 1.0, 1.0 - 1e-6
    target = source.clone()
    target[1, 1] = 1.0 + 1e-6
    scores = score(source, target, torch.tensor([-1, -1]))
    found = summary(scores, torch.ones(2, dtype=torch.bool), DOUBT)
    assert found.top1 == 0.5
    assert found.top1_decisive == 1


def test_quantiles_are_values_that_occur() -> None:
    values = torch.arange(1.0, 1001.0)
    assert quantile(values, 0.99) == 990
    assert quantile(values, 0.999) == 999
    assert quantile(values[:1], 0.99) == 1


def test_divergence_names_the_worst_position() -> None:
    source = torch.ones(3, 4)
    target = source.clone()
    target[1, 2] += 0.5
    found = divergence(source, target)
    assert (found.worst, found.position) == (0.25, 1)
    assert found.mean == 0.25 / 3
    assert found.source_rms == 1
    assert math.isclose(found.target_rms, (2 + math.sqrt((3 + 1.5**2) / 4)) / 3)
    assert (divergence(source, source).worst, divergence(source, source).mean) == (0, 0)
    target[2, 0] = math.nan
    found = divergence(source, target)
    assert (found.worst, found.position, found.mean) == (math.inf, 2, math.inf)


def test_kl_is_told_between_borders_and_every_position_counts_once() -> None:
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 9])
    kl = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], dtype=torch.float64)
    assert kl_ranges(kl, positions, [0, 1, 3, 5, 8]) == (
        KlRange(0, 1, 2, 3.0, 5.0),
        KlRange(1, 3, 3, 11 / 3, 6.0),
        KlRange(3, 5, 1, 4.0, 4.0),
        KlRange(8, 10, 1, 7.0, 7.0),
    )


def test_the_same_choices_ignore_the_order_of_experts() -> None:
    source = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    target = torch.tensor([[1, 0], [2, 3], [4, 6], [6, 7]])
    assert same_choices(source, target) == 3


def test_nan_exceeds_every_limit() -> None:
    source = random_logits(0, vocab=64)
    target = source.clone()
    target[3, 3] = math.nan
    scores = score(source, target, torch.full((6,), -1))
    found = summary(scores, torch.ones(6, dtype=torch.bool), DOUBT)
    words = violations(load_limits("float32"), found, [("layer 0 experts", math.inf)], [1.0])
    assert [line.split(":")[0] for line in words] == [
        "max |Δlogit|",
        "max KL",
        "mean KL",
        "relative error after layer 0 experts",
    ]

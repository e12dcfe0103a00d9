"""Numbers that say how far two models' outputs are apart; identical outputs give exact zeros."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gptoss_convert.witness import products

VOCAB_CHUNK = 16384
"""Logits widened to float64 at once, per position."""
POSITIONS_CHUNK = 8192
"""Positions of the residual stream widened to float64 at once."""


@dataclass(frozen=True)
class TokenScores:
    """Source against target at each position, float64 `[T]` on the CPU."""

    kl: Tensor
    """KL(source || target), in nats."""
    max_delta: Tensor
    """Largest |Δlogit|."""
    mean_delta: Tensor
    """Mean |Δlogit|."""
    top1: Tensor
    """1 where both have the same most likely token."""
    top5: Tensor
    """Share of the five most likely tokens they have in common."""
    margin: Tensor
    """Distance of the source's two largest logits."""
    source_nll: Tensor
    """-log p of the next token, NaN at the last position of a sequence."""
    target_nll: Tensor


def score(source_TV: Tensor, target_TV: Tensor, next_T: Tensor) -> TokenScores:
    """Compare logits by position; `next_T` holds the next token, -1 where there is none."""
    kl, largest, mean_delta, source_lse, target_lse = _compared(source_TV, target_TV)
    source_top = source_TV.topk(5, dim=1)
    target_top = source_top if target_TV is source_TV else target_TV.topk(5, dim=1)
    shared = (source_top.indices.unsqueeze(2) == target_top.indices.unsqueeze(1)).any(2)
    columns = {
        "kl": kl.clamp(min=0),  # nats cannot be negative; the sum's rounding can
        "max_delta": largest,
        "mean_delta": mean_delta,
        "top1": source_top.indices[:, 0] == target_top.indices[:, 0],
        "top5": shared.sum(1).double() / 5,
        "margin": source_top.values[:, 0] - source_top.values[:, 1],
        "source_nll": _nll(source_TV, source_lse, next_T),
        "target_nll": _nll(target_TV, target_lse, next_T),
    }
    return TokenScores(**{name: column.double().cpu() for name, column in columns.items()})


def _compared(source_TV: Tensor, target_TV: Tensor) -> Sequence[Tensor]:
    """KL, largest and mean |Δlogit|, both log-sum-exps of each position, float64 `[T]`."""
    if products.usable(source_TV.device):
        from gptoss_convert.witness import kernels

        return kernels.score(source_TV, target_TV).unbind()
    source_lse, target_lse = log_sum_exp(source_TV), log_sum_exp(target_TV)
    kl, largest, total = (torch.zeros_like(source_lse) for _ in range(3))
    for source, target in zip(
        source_TV.split(VOCAB_CHUNK, 1), target_TV.split(VOCAB_CHUNK, 1), strict=True
    ):
        p_log = source.double() - source_lse.unsqueeze(1)
        q_log = target.double() - target_lse.unsqueeze(1)
        kl += (p_log.exp() * (p_log - q_log)).sum(1)
        delta = (source.double() - target.double()).abs()
        largest = torch.maximum(largest, delta.amax(1))
        total += delta.sum(1)
    return kl, largest, total / source_TV.shape[1], source_lse, target_lse


def log_sum_exp(logits_TV: Tensor) -> Tensor:
    """log Σ exp over the vocabulary, float64 `[T]`."""
    parts = [part.double().logsumexp(1) for part in logits_TV.split(VOCAB_CHUNK, 1)]
    return torch.stack(parts, dim=1).logsumexp(1)


def _nll(logits_TV: Tensor, lse_T: Tensor, next_T: Tensor) -> Tensor:
    chosen = logits_TV.gather(1, next_T.clamp(min=0).unsqueeze(1)).squeeze(1).double()
    return torch.where(next_T >= 0, lse_T - chosen, math.nan)


def joined(parts: Sequence[TokenScores]) -> TokenScores:
    """The scores of all parts, one after another."""
    return TokenScores(
        **{
            f.name: torch.cat([getattr(part, f.name) for part in parts])
            for f in fields(TokenScores)
        }
    )


@dataclass(frozen=True)
class Summary:
    """Scores of a set of positions, as plain numbers."""

    positions: int
    kl_mean: float
    kl_p99: float
    kl_p999: float
    kl_max: float
    top1: float
    """Share of positions with the same most likely token."""
    top1_decisive: float
    """The same among positions whose margin is beyond doubt; 1 if there are none."""
    top5: float
    max_delta: float
    mean_delta: float
    source_nll: float
    target_nll: float
    perplexity_difference: float
    """exp(target_nll) - exp(source_nll)."""


def summary(scores: TokenScores, chosen: Tensor, doubt: float) -> Summary:
    """Summarize the positions where `chosen` (bool `[T]`) holds, at least one.

    A margin above twice `doubt`, the |Δlogit| that rounding explains, makes top-1 decisive.
    """
    kl = scores.kl[chosen].sort().values
    decisive = scores.top1[chosen & (scores.margin > 2 * doubt)]
    source_nll, target_nll = (
        mean(nll[chosen & ~nll.isnan()]) for nll in (scores.source_nll, scores.target_nll)
    )
    return Summary(
        positions=len(kl),
        kl_mean=mean(kl),
        kl_p99=quantile(kl, 0.99),
        kl_p999=quantile(kl, 0.999),
        kl_max=float(kl[-1]),
        top1=mean(scores.top1[chosen]),
        top1_decisive=mean(decisive) if len(decisive) else 1.0,
        top5=mean(scores.top5[chosen]),
        max_delta=float(scores.max_delta[chosen].max()),
        mean_delta=mean(scores.mean_delta[chosen]),
        source_nll=source_nll,
        target_nll=target_nll,
        perplexity_difference=math.exp(target_nll) - math.exp(source_nll),
    )


def mean(values: Tensor) -> float:
    """The mean of float64 values, of their exact sum: the same on however many threads."""
    if not values.isfinite().all():
        return float(values.mean())
    return math.fsum(values.tolist()) / len(values) if len(values) else math.nan


@dataclass(frozen=True)
class KlRange:
    """KL of the positions from `start` on, before `end`."""

    start: int
    end: int
    positions: int
    kl_mean: float
    kl_max: float


def kl_ranges(kl_T: Tensor, position_T: Tensor, borders: Sequence[int]) -> tuple[KlRange, ...]:
    """KL between neighbouring borders, ascending from 0, without empty ranges."""
    edges = [*borders, int(position_T.max()) + 1]
    ranges = torch.bucketize(position_T, torch.tensor(borders), right=True) - 1
    found: list[KlRange] = []
    for n, (start, end) in enumerate(pairwise(edges)):
        if len(chosen := kl_T[ranges == n]):
            found.append(KlRange(start, end, len(chosen), mean(chosen), float(chosen.max())))
    return tuple(found)


def quantile(ascending: Tensor, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return float(ascending[max(0, math.ceil(share * len(ascending)) - 1)])


class Divergence(NamedTuple):
    """How far the same positions are apart in source and target."""

    worst: float
    """The largest ||source - target|| / ||source||; NaN counts as inf."""
    position: int
    """Where that is."""
    mean: float
    """The mean of the same ratio."""
    source_rms: float
    """Root mean square of a position's elements, on average."""
    target_rms: float


def divergence(source_TD: Tensor, target_TD: Tensor) -> Divergence:
    """Hold two states `[T, D]` of the same positions against each other, in float64."""
    return divergences([measured(source_TD, target_TD)])[0]


def measured(source_TD: Tensor, target_TD: Tensor) -> Tensor:
    """The numbers of a `Divergence`, float64 on the device, which need not be waited for."""
    parts = [
        _norms(source, target)
        for source, target in zip(
            source_TD.split(POSITIONS_CHUNK), target_TD.split(POSITIONS_CHUNK), strict=True
        )
    ]
    distance_T, source_T, target_T = (torch.cat(columns) for columns in zip(*parts, strict=True))
    ratio_T = torch.where(distance_T == 0, 0.0, distance_T / source_T)
    ratio_T = torch.where(ratio_T.isnan(), math.inf, ratio_T)
    worst, width = ratio_T.max(0), math.sqrt(source_TD.shape[1])
    # Of equal ratios any may be found; where all are zero let it be the first.
    position = torch.where(worst.values > 0, worst.indices, 0).double()
    rms = source_T.mean() / width, target_T.mean() / width
    return torch.stack((worst.values, position, ratio_T.mean(), *rms))


def divergences(found: Sequence[Tensor]) -> list[Divergence]:
    """What `measured` gave, fetched from the device at once."""
    rows = torch.stack([*found]).tolist() if found else []
    return [Divergence(worst, int(position), *rest) for worst, position, *rest in rows]


def _norms(source_TD: Tensor, target_TD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    source = source_TD.double()
    source_T = source.norm(dim=1)
    if target_TD.data_ptr() == source_TD.data_ptr():  # one computation serves both
        return torch.zeros_like(source_T), source_T, source_T
    target = target_TD.double()
    return (source - target).norm(dim=1), source_T, target.norm(dim=1)


def same_choices(source_TA: Tensor, target_TA: Tensor) -> Tensor:
    """How many positions chose the same set of experts, int64 on the device."""
    same = source_TA.sort(1).values == target_TA.sort(1).values
    return same.all(1).sum()

"""Is a distance what rounding explains? Limits are floors of the model at hand, times a factor.

The floor is the distance of this very model in bfloat16 from itself in float32, at the same
positions and tokens. Where a routing flips, a single position moves far, in an honest server as
well: medians and ninth deciles are judged, means and maxima only reported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_convert.witness import metrics
from gptoss_convert.witness.limits import ServedLimits
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.served.distance import Answers, Distance, Model, server_likeliest

ALL = "all"
ADDED = "added"
"""The range of the tokens that the server added itself."""


@dataclass(frozen=True)
class Spread:
    """KL at some positions, in nats, and |Δ log p| of the tokens that follow."""

    kl_median: float
    kl_p90: float
    kl_mean: float
    kl_max: float
    following: int
    """Positions at which the server told the log probability of the token that follows."""
    delta_median: float
    """NaN where there are none."""
    delta_p90: float

    @classmethod
    def of(cls, found: Distance, chosen: Tensor) -> Spread:
        """Over the positions where `chosen` (bool `[P]`) holds, at least one."""
        kl = found.kl[chosen].sort().values
        delta = found.delta[chosen & ~found.delta.isnan()].sort().values
        known = len(delta) > 0
        return cls(
            kl_median=metrics.quantile(kl, 0.5),
            kl_p90=metrics.quantile(kl, 0.9),
            kl_mean=metrics.mean(kl),
            kl_max=float(kl[-1]),
            following=len(delta),
            delta_median=metrics.quantile(delta, 0.5) if known else math.nan,
            delta_p90=metrics.quantile(delta, 0.9) if known else math.nan,
        )


@dataclass(frozen=True)
class Range:
    """One range of positions: a server's distance from the model, and what rounding makes."""

    name: str
    """`all`, `<128`, `128-4095`, `>=4096`, or `added`."""
    positions: int
    server: Spread
    floor: Spread
    judged: bool
    """Whether there are enough positions to tell."""
    over: tuple[str, ...]
    """Each limit that is exceeded, in words."""


@dataclass(frozen=True)
class Agreement:
    """Whether both have the same most likely token."""

    everywhere: float
    """Share of all positions at which the server told its most likely token."""
    clear: float
    """Share of the positions where rounding cannot decide; 1 if there are none."""
    clear_positions: int
    least_margin: float
    """Distance of the two largest log probabilities from which on a position is clear."""
    over: tuple[str, ...]


def ranges(
    asked: Answers, server: Distance, floor: Distance, config: ModelConfig, limits: ServedLimits
) -> tuple[Range, ...]:
    """All positions, then by their place in the context, then those the server added."""
    return tuple(
        _range(name, server, floor, chosen, limits)
        for name, chosen in _chosen(asked, config)
        if chosen.any()
    )


def _chosen(asked: Answers, config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    window, original, position = config.window, config.rope_original_length, asked.position
    yield ALL, torch.ones_like(asked.added)
    yield f"<{window}", position < window
    yield f"{window}-{original - 1}", (position >= window) & (position < original)
    yield f">={original}", position >= original
    yield ADDED, asked.added


def _range(
    name: str, server: Distance, floor: Distance, chosen: Tensor, limits: ServedLimits
) -> Range:
    found, honest, count = Spread.of(server, chosen), Spread.of(floor, chosen), int(chosen.sum())
    judged = count >= limits.least_positions
    over = tuple(_over(name, found, honest, count, limits)) if judged else ()
    return Range(name, count, found, honest, judged, over)


def _over(
    name: str, found: Spread, honest: Spread, count: int, limits: ServedLimits
) -> Iterator[str]:
    where = {ALL: "at all positions", ADDED: "at tokens that the server added"}
    place = where.get(name, f"at positions {name}")
    checks = [
        (
            "median KL",
            found.kl_median,
            honest.kl_median,
            limits.kl_factor * _slack(count, limits),
            limits.least_kl,
        )
    ]
    if found.following >= limits.least_positions:
        checks.append(
            (
                "median |Δ log p|",
                found.delta_median,
                honest.delta_median,
                math.sqrt(limits.kl_factor * _slack(found.following, limits)),
                limits.least_delta,
            )
        )
    if count >= limits.decile_positions:
        checks.append(
            ("9th decile of KL", found.kl_p90, honest.kl_p90, limits.decile_factor, limits.least_kl)
        )
    for what, value, rounding, factor, least in checks:
        limit = max(factor * rounding, least)
        if value > limit:
            yield (
                f"{place}: {what} expects at most {limit:.2g} ({rounding:.2g} is bfloat16's), "
                f"found {value:.2g}"
            )


def _slack(count: int, limits: ServedLimits) -> float:
    """A median of few positions is uncertain itself."""
    return math.exp(limits.allowance / math.sqrt(count))


def agreement(asked: Answers, model: Model, floor: Distance, limits: ServedLimits) -> Agreement:
    """Where the model's choice is clear, an honest server makes the same."""
    least = 4 * metrics.quantile(floor.worst.sort().values, 0.9)
    same = server_likeliest(asked) == model.likeliest
    clear = same[asked.likeliest_told & (model.margin > least)]
    everywhere = same[asked.likeliest_told].double()
    share = float(clear.double().mean()) if len(clear) else 1.0
    over: tuple[str, ...] = ()
    if len(clear) >= limits.least_positions and share < limits.top1_clear:
        over = (
            f"most likely token: expects {limits.top1_clear:.0%} the same where the choice is "
            f"clear, found {share:.1%} of {len(clear):,}",
        )
    return Agreement(metrics.mean(everywhere), share, len(clear), least, over)


def advantage(model: Distance, other: Distance, floor: Distance) -> tuple[float, float]:
    """How much nearer answers are to another model: the mean of the logarithm of the ratio of
    both distances, and its standard error. Above 0 the other explains them better.
    """
    least = 0.01 * metrics.quantile(floor.kl.sort().values, 0.5) + 1e-12
    ratio = ((model.kl + least) / (other.kl + least)).log()
    return float(ratio.mean()), float(ratio.std()) / math.sqrt(len(ratio))


def alike(first: Sequence[float] | Tensor, second: Sequence[float] | Tensor, factor: float) -> bool:
    """Whether two sets of distances have the same quartiles and ninth decile, within a factor."""
    a, b = (torch.as_tensor(one, dtype=torch.float64).sort().values for one in (first, second))
    pairs = ((metrics.quantile(a, s), metrics.quantile(b, s)) for s in (0.25, 0.5, 0.75, 0.9))
    return all(x <= factor * y and y <= factor * x for x, y in pairs)

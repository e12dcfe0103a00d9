"""Which known mistake of an engine a server's answers look like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.limits import ServedLimits
from gptoss_convert.witness.mistakes import MISTAKES, Mistake, MistakenReader
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.served.distance import (
    Answers,
    Distance,
    Model,
    distance,
    model_answers,
)
from gptoss_convert.witness.served.judge import Spread, advantage, alike, ranges

POSITIONS = 6000
"""About how many tokens are computed for each mistake."""
FINALISTS = 3
"""Mistakes, the nearest, of which bfloat16's own distance is computed."""


@dataclass(frozen=True)
class Likeness:
    """How near a server is to a model with a known mistake."""

    mistake: str
    """What goes after "answers as if"."""
    spread: Spread
    """The server's distance from that model."""
    near: bool
    """Whether rounding explains all of it; asked of the nearest ones only."""
    better: bool
    """Whether it explains the answers better than the model does."""
    advantage: float
    """Mean logarithm of (distance from the model / distance from that model)."""
    sigmas: float
    """The same in standard errors."""


@dataclass(frozen=True)
class Diagnosis:
    """Every known mistake that the model can suffer, nearest first."""

    likenesses: tuple[Likeness, ...]
    model: Spread
    """The server's distance from the model itself, at the same positions."""
    positions: int

    @property
    def nearest(self) -> Likeness:
        """The mistake that leaves the least to explain."""
        return self.likenesses[0]

    @property
    def named(self) -> Likeness | None:
        """The nearest one, if it explains the answers better than the model does."""
        return self.nearest if self.nearest.near and self.nearest.better else None

    @property
    def finding(self) -> str:
        """What the server does, in a sentence."""
        one = self.nearest
        apart = (
            f"KL {one.spread.kl_median:.1e} to that, {self.model.kl_median:.1e} to the model "
            "(medians)"
        )
        if self.named:
            return f"answers as if {one.mistake}: {apart}"
        if one.better:
            return f"no known mistake alone explains it; nearest: as if {one.mistake}, {apart}"
        count = len(self.likenesses)
        return f"none of {count} known mistakes is near; nearest: as if {one.mistake}, {apart}"


def diagnose(
    reader: Reader,
    asked: Answers,
    model: Model,
    floor: Distance,
    device: torch.device,
    limits: ServedLimits,
    advance: Callable[[], None] = lambda: None,
    mistakes: Sequence[Mistake] = MISTAKES,
) -> Diagnosis:
    """Run the forward pass with each known mistake over some of the sequences.

    `advance` is called after each.
    """
    part, rows = _part(asked)
    ours = Model(model.logprobs[rows], model.likeliest[rows], model.margin[rows])
    rounding = Distance(floor.kl[rows], floor.delta[rows], floor.worst[rows])
    look = _Look(reader, part, ours, rounding, device, limits)
    seen: list[_Seen] = []
    for mistake in mistakes:
        if mistake.possible(reader.config):
            seen.append(look.at(mistake))
            advance()
    seen.sort(key=lambda one: one.spread.kl_median)
    found = [look.likeness(one, n < FINALISTS) for n, one in enumerate(seen)]
    found.sort(key=lambda one: not (one.near and one.better))
    straight = Spread.of(look.straight, torch.ones_like(part.added))
    return Diagnosis(tuple(found), straight, len(part))


@dataclass(frozen=True)
class _Seen:
    """A model with a mistake, and the server's distance from it."""

    mistake: Mistake
    answers: Model
    apart: Distance
    spread: Spread


class _Look:
    """A server's answers beside the model's own, to be held against one mistake after another."""

    def __init__(
        self,
        reader: Reader,
        asked: Answers,
        model: Model,
        floor: Distance,
        device: torch.device,
        limits: ServedLimits,
    ):
        self.reader, self.asked, self.model, self.floor = reader, asked, model, floor
        self.device, self.limits = device, limits
        self.straight = distance(model, asked.logprobs, asked)

    def at(self, mistake: Mistake) -> _Seen:
        """How far the server is from a model with this mistake."""
        answers = self._answers(mistake, torch.float32)
        apart = distance(answers, self.asked.logprobs, self.asked)
        return _Seen(mistake, answers, apart, Spread.of(apart, torch.ones_like(self.asked.added)))

    def likeness(self, seen: _Seen, close: bool) -> Likeness:
        """What that distance means; only of one that is `close` it is asked whether it is near."""
        limits, mistake = self.limits, seen.mistake
        gain, error = advantage(self.straight, seen.apart, self.floor)
        sigmas = gain / error if error else 0.0
        better = gain > limits.advantage and sigmas > limits.sigmas
        near = (close or mistake.coarse) and self._near(seen)
        if near and mistake.coarse and not better:
            # Of two such roundings each goes its own way, but both go equally far.
            made = distance(self.model, seen.answers.logprobs, self.asked)
            better = alike(self.straight.kl, made.kl, limits.coarse)
        return Likeness(mistake.name, seen.spread, near, better, gain, sigmas)

    def _near(self, seen: _Seen) -> bool:
        """Whether the rest is what bfloat16 does to this very model."""
        rounded = self._answers(seen.mistake, torch.bfloat16)
        floor = distance(seen.answers, rounded.logprobs, self.asked)
        parts = ranges(self.asked, seen.apart, floor, self.reader.config, self.limits)
        return not any(one.over for one in parts)

    def _answers(self, mistake: Mistake, dtype: torch.dtype) -> Model:
        numerics = Numerics.on(self.device, dtype)
        return model_answers(
            MistakenReader(self.reader, mistake), self.asked, self.device, numerics
        )


def _part(asked: Answers) -> tuple[Answers, torch.Tensor]:
    """The first sequence, which is a long one, and as many others as there is room for."""
    chosen, room = [0], POSITIONS - len(asked.sequences[0])
    for n, tokens in enumerate(asked.sequences[1:], 1):
        if len(tokens) <= room:
            chosen.append(n)
            room -= len(tokens)
    return asked.some(chosen), torch.isin(asked.sequence, torch.tensor(chosen))

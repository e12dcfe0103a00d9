"""What a comparison of values found, step by step and summed up by parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

from gptoss_convert.compare.diagnosis import Homes, Piece, homes, misplaced
from gptoss_convert.compare.value_statistics import (
    Energy,
    StepStatistics,
    ValueStatistics,
    gathered,
    sqnr,
)
from gptoss_convert.conversion.manifest import fingerprints
from gptoss_convert.engine.steps import Plan, Step
from gptoss_convert.layouts.extents import volume

_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Element:
    """One element that differs: where, both values, and how many BF16 numbers lie between."""

    index: tuple[int, ...]
    source: float
    target: float
    ulps: int


@dataclass
class Difference:
    """What differs in one parameter of one layer."""

    parameter: str
    layer: int | None
    source_tensors: tuple[str, ...]
    target_tensors: tuple[str, ...]
    elements: int
    differing: int
    first: Element
    worst: Element
    looks: str | None
    """A known mistake that explains the first tile that differs: `transposed`, ..."""
    sqnr: float | None = None
    """Signal to noise of the target in dB, where statistics are wanted."""


@dataclass
class ValuesReport:
    """The comparison of all parameters."""

    elements: int = 0
    differing: int = 0
    differences: list[Difference] = field(default_factory=list)
    parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fingerprints of the source, by parameter."""
    target_parameters: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Fingerprints of the target, by parameter."""
    statistics: ValueStatistics | None = None
    """What only a report shows, where it is wanted."""

    @property
    def same(self) -> bool:
        """Whether not one bit differs."""
        return self.differing == 0

    def summary(self) -> dict[str, Any]:
        """The report as plain data."""
        return {"same": self.same, **asdict(self)}


@dataclass(frozen=True)
class Compared:
    """What one step of the plan found."""

    step: int
    differing: int
    first: Element | None
    worst: Element | None
    looks: str | None
    pieces: tuple[Piece, ...]
    fingerprint: int
    target_fingerprint: int
    statistics: StepStatistics | None = None

    def plain(self) -> list[Any]:
        """The same as JSON values."""
        pieces = [
            [one.layer, one.expert, one.rest, one.source.hex(), one.target.hex()]
            for one in self.pieces
        ]
        ends = [one and astuple(one) for one in (self.first, self.worst)]
        statistics = self.statistics and [
            [[expert, *astuple(energy)] for expert, energy in self.statistics.energies.items()],
            self.statistics.source_scales,
            self.statistics.target_scales,
        ]
        rest = [self.fingerprint, self.target_fingerprint, statistics]
        return [self.step, self.differing, ends, self.looks, pieces, *rest]

    @classmethod
    def of(cls, plain: Sequence[Any]) -> Compared:
        """What another process made plain."""
        step, differing, ends, looks, pieces, share, other, statistics = plain
        first, worst = (one and Element(tuple(one[0]), *one[1:]) for one in ends)
        found = (
            Piece(
                layer,
                expert,
                tuple((low, high) for low, high in rest),
                bytes.fromhex(source),
                bytes.fromhex(target),
            )
            for layer, expert, rest, source, target in pieces
        )
        if statistics:
            energies, *scales = statistics
            statistics = StepStatistics(
                {expert: Energy(*sums) for expert, *sums in energies}, *map(tuple, scales)
            )
        return cls(step, differing, first, worst, looks, tuple(found), share, other, statistics)


def summed_up(plan: Plan, compared: Sequence[Compared]) -> ValuesReport:
    """The report of all steps, in the order of the plan."""
    report = ValuesReport()
    groups: dict[tuple[str, int | None], list[Compared]] = defaultdict(list)
    for result in compared:
        step = plan.steps[result.step]
        layer = step.layer if step.layer_axis >= 0 else None
        groups[step.family.weight, layer].append(result)
    ours = ((plan.steps[one.step], one.fingerprint) for one in compared)
    theirs = ((plan.steps[one.step], one.target_fingerprint) for one in compared)
    report.parameters, report.target_parameters = _fingerprints(ours), _fingerprints(theirs)
    told = [(plan.steps[one.step], one.statistics) for one in compared if one.statistics]
    report.statistics = gathered(told) if told else None
    known = {weight: homes(_pieces(compared, plan, weight)) for weight in report.parameters}
    for (weight, layer), results in groups.items():
        steps = [plan.steps[result.step] for result in results]
        report.elements += sum(volume(step.box) for step in steps)
        if any(result.differing for result in results):
            report.differences.append(_difference(weight, layer, steps, results, known[weight]))
    report.differing = sum(difference.differing for difference in report.differences)
    return report


def _fingerprints(found: Iterable[tuple[Step, int]]) -> dict[str, dict[str, Any]]:
    """By parameter, from the shares of its steps."""
    shares: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for step, share in found:
        layers = shares[step.family.weight]
        layers[step.layer] = (layers[step.layer] + share) & _MASK
    return {weight: fingerprints(layers) for weight, layers in shares.items()}


def _pieces(compared: Sequence[Compared], plan: Plan, weight: str) -> Iterator[Piece]:
    for result in compared:
        if plan.steps[result.step].family.weight == weight:
            yield from result.pieces


def _difference(
    weight: str,
    layer: int | None,
    steps: Sequence[Step],
    results: Sequence[Compared],
    known: Homes,
) -> Difference:
    moved = misplaced((piece for result in results for piece in result.pieces), known)
    firsts = [result.first for result in results if result.first]
    worsts = [result.worst for result in results if result.worst]
    return Difference(
        weight,
        layer,
        tuple(dict.fromkeys(extent.tensor for step in steps for extent in step.sources)),
        tuple(dict.fromkeys(extent.tensor for step in steps for extent in step.targets)),
        sum(volume(step.box) for step in steps),
        sum(result.differing for result in results),
        min(firsts, key=lambda element: element.index),
        max(worsts, key=lambda element: element.ulps),
        moved or next((result.looks for result in results if result.looks), None),
        sqnr(result.statistics for result in results if result.statistics),
    )

"""What a comparison of values found, step by step and summed up by parameter."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from gptoss_convert.compare.arrays import Distance
from gptoss_convert.compare.diagnosis import ExpertDigests, Homes, homes, misplaced
from gptoss_convert.compare.value_statistics import (
    StepStatistics,
    ValueStatistics,
    gathered,
    sqnr,
)
from gptoss_convert.engine.fingerprint import by_layer, listing
from gptoss_convert.engine.steps import Plan, Step
from gptoss_convert.layouts.extents import volume


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
    """A known mistake that explains the first expert that differs: `transposed`, ..."""
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
    fingerprint: int
    target_fingerprint: int
    statistics: StepStatistics | None = None


@dataclass(frozen=True)
class Explained:
    """What the values of a step look like, some of which differ."""

    step: int
    weight: str
    layer: int | None
    looks: str | None
    experts: tuple[ExpertDigests, ...]
    distances: Mapping[int, Distance] = field(default_factory=dict)
    """By expert, -1 for weights that are never MXFP4, where statistics are wanted."""


def summed_up(
    plan: Plan, compared: Sequence[Compared], explained: Sequence[Explained]
) -> ValuesReport:
    """The report of all steps, both in the order of their plans."""
    report = ValuesReport()
    groups: dict[tuple[str, int | None], list[Compared]] = defaultdict(list)
    for result in compared:
        groups[place_of(plan.steps[result.step])].append(result)
    ours = by_layer(plan, ((one.step, one.fingerprint) for one in compared))
    theirs = by_layer(plan, ((one.step, one.target_fingerprint) for one in compared))
    report.parameters = {weight: listing(layers) for weight, layers in ours.items()}
    report.target_parameters = {weight: listing(layers) for weight, layers in theirs.items()}
    told = [(plan.steps[one.step], one.statistics) for one in compared if one.statistics]
    apart = ((one.weight, one.layer, one.distances) for one in explained)
    report.statistics = gathered(told, apart) if told else None
    known = {weight: homes(_digests(explained, weight)) for weight in report.parameters}
    for (weight, layer), results in groups.items():
        steps = [plan.steps[result.step] for result in results]
        report.elements += sum(volume(step.box) for step in steps)
        if any(result.differing for result in results):
            why = [one for one in explained if (one.weight, one.layer) == (weight, layer)]
            found = _difference(weight, layer, steps, results, why)
            report.differences.append(replace(found, looks=_looks(why, known[weight])))
    report.differing = sum(difference.differing for difference in report.differences)
    return report


def place_of(step: Step) -> tuple[str, int | None]:
    """The weight and the layer of a step."""
    return step.family.weight, step.layer if step.layer_axis >= 0 else None


def _digests(explained: Sequence[Explained], weight: str) -> Iterator[ExpertDigests]:
    for one in explained:
        if one.weight == weight:
            yield from one.experts


def _looks(explained: Sequence[Explained], known: Homes) -> str | None:
    moved = misplaced((one for each in explained for one in each.experts), known)
    return moved or next((one.looks for one in explained if one.looks), None)


def _difference(
    weight: str,
    layer: int | None,
    steps: Sequence[Step],
    results: Sequence[Compared],
    explained: Sequence[Explained],
) -> Difference:
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
        looks=None,
        sqnr=sqnr(one for each in explained for one in each.distances.values()),
    )

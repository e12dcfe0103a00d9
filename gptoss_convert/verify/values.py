"""Exact values: every parameter of two checkpoints, decoded and compared bit by bit.

Both sides are streamed at once, through the mapping tables, so this level cannot see a wrong
table: the logits level can. Memory is bounded as in a conversion, and each byte is read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.checkpoint import Checkpoint
from gptoss_convert.errors import InputError
from gptoss_convert.extents import Extent, volume
from gptoss_convert.fingerprint import fingerprint
from gptoss_convert.manifest import fingerprints
from gptoss_convert.model import load_model
from gptoss_convert.progress import SILENT, Progress
from gptoss_convert.steps import Plan, Step, make_plan
from gptoss_convert.verify.looks import Bits, Homes, Piece, homes, looks, misplaced, pieces
from gptoss_convert.verify.pairs import Side, judge_steps, second
from gptoss_convert.verify.value_statistics import (
    StepStatistics,
    ValueStatistics,
    gathered,
    sqnr,
    step_statistics,
)

_AT_ONCE = 1 << 18
"""Elements compared at once: both sides stay in the cache."""
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
class _Compared:
    step: int
    differing: int
    first: Element | None
    worst: Element | None
    looks: str | None
    pieces: tuple[Piece, ...]
    fingerprint: int
    target_fingerprint: int
    statistics: StepStatistics | None = None


def compare_values(
    source: Checkpoint,
    target: Checkpoint,
    *,
    layers: int | None = None,
    workers: int | None = None,
    max_memory: int = 4_000_000_000,
    statistics: bool = False,
    progress: Progress = SILENT,
) -> ValuesReport:
    """Compare every element, or those of the first `layers` layers and of no layer.

    With `statistics`, collect what a report shows beside the differences.

    Raises InputError if the two models have different sizes.
    """
    ours, theirs = source.config.numbers, target.config.numbers
    for key in ours:
        if key != "max_position_embeddings" and ours[key] != theirs[key]:
            raise InputError(f"{target.root}: {key} is {theirs[key]}, SOURCE has {ours[key]}")
    model = load_model()
    plan = make_plan(model, model.sizes(ours), _stored(source), second(_stored(target)))
    numbers = [n for n, step in enumerate(plan.steps) if layers is None or step.layer < layers]

    def judge(number: int, step: Step, ours: Side, theirs: Side) -> _Compared:
        found = _compare(number, step, ours.values, theirs.values)
        if not statistics:
            return found
        held = [ours.parts, theirs.parts]
        return replace(
            found, statistics=step_statistics(step, ours.values, theirs.values, held=held)
        )

    compared = judge_steps(
        source,
        target,
        plan,
        numbers,
        judge,
        workers=workers,
        max_memory=max_memory,
        progress=progress,
    )
    return _report(plan, sorted(compared, key=lambda result: result.step))


def _stored(checkpoint: Checkpoint) -> list[Extent]:
    """The extents of the weights themselves: a sidecar's scales are no values."""
    found = checkpoint.extents()
    held = {extent.param for extent in found}
    lone = {
        family.scales
        for family in load_model().families.values()
        if family.blocks is not None and family.blocks not in held
    }
    return [extent for extent in found if extent.param not in lone]


def _compare(number: int, step: Step, ours: Bits, theirs: Bits) -> _Compared:
    a, b = ours.reshape(-1), theirs.reshape(-1)
    share = fingerprint(ours, step.box, step.lengths, step.layer_axis)
    differing = 0
    first: Element | None = None
    worst: Element | None = None
    for start in range(0, len(a), _AT_ONCE):
        x, y = a[start : start + _AT_ONCE], b[start : start + _AT_ONCE]
        if np.array_equal(x, y):
            continue
        places = np.flatnonzero(x != y)
        differing += len(places)
        distance = np.abs(_ordered(x[places]) - _ordered(y[places]))
        furthest = int(distance.argmax())
        if first is None:
            first = _element(step, start + int(places[0]), a, b, int(distance[0]))
        if worst is None or int(distance[furthest]) > worst.ulps:
            worst = _element(step, start + int(places[furthest]), a, b, int(distance[furthest]))
    if not differing:
        return _Compared(number, 0, None, None, None, (), share, share)
    explained = looks(step, ours, theirs)
    found = pieces(step, ours, theirs)
    other = fingerprint(theirs, step.box, step.lengths, step.layer_axis)
    return _Compared(number, differing, first, worst, explained, found, share, other)


def _ordered(bits: Bits) -> npt.NDArray[np.int32]:
    """Integers in the order of the values: neighbours differ by one, both zeros are 0."""
    magnitude = (bits & np.uint16(0x7FFF)).astype(np.int32)
    return np.where(bits >> np.uint16(15), -magnitude, magnitude)


def _element(step: Step, place: int, a: Bits, b: Bits, ulps: int) -> Element:
    shape = [hi - lo for lo, hi in step.box]
    inside = np.unravel_index(place, shape)
    index = tuple(int(i) + lo for i, (lo, _) in zip(inside, step.box, strict=True))
    return Element(index, _value(a[place]), _value(b[place]), ulps)


def _value(bits: np.uint16) -> float:
    return float(np.array([int(bits) << 16], np.uint32).view(np.float32)[0])


def _report(plan: Plan, compared: Sequence[_Compared]) -> ValuesReport:
    report = ValuesReport()
    groups: dict[tuple[str, int | None], list[_Compared]] = defaultdict(list)
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


def _pieces(compared: Sequence[_Compared], plan: Plan, weight: str) -> Iterator[Piece]:
    for result in compared:
        if plan.steps[result.step].family.weight == weight:
            yield from result.pieces


def _difference(
    weight: str,
    layer: int | None,
    steps: Sequence[Step],
    results: Sequence[_Compared],
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

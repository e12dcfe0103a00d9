"""Exact values: every parameter of two checkpoints, decoded and compared bit by bit.

Both sides are streamed at once, through the mapping tables, so this level cannot see a wrong
table: the logits level can. Memory is bounded as in a conversion. Each byte is read once; what
differs again, to say where, and once more expert by expert, to say what it looks like.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from gptoss_convert.compare.arrays import distance, equal
from gptoss_convert.compare.diagnosis import Bits, expert_digests, looks
from gptoss_convert.compare.merge_diagnosis import UNMERGED, looks_merged
from gptoss_convert.compare.pairs import Judge, StepPair, judge_steps
from gptoss_convert.compare.value_statistics import distances_of, step_statistics
from gptoss_convert.compare.values_report import (
    Compared,
    Element,
    Explained,
    ValuesReport,
    place_of,
    summed_up,
)
from gptoss_convert.containers.json_records import from_json, to_json
from gptoss_convert.engine.buffers import Parts
from gptoss_convert.engine.changes import Changes, merges_of
from gptoss_convert.engine.fingerprint import MASK, examined
from gptoss_convert.engine.steps import Plan, Step, make_plan
from gptoss_convert.errors import InputError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.layouts.extents import Extent, volume
from gptoss_convert.layouts.model import load_model
from gptoss_convert.machine.partition import balanced
from gptoss_convert.machine.progress import SILENT, Progress
from gptoss_convert.machine.ranks import ALONE, Ranks

T = TypeVar("T")
_AT_ONCE = 1 << 16
"""Elements compared at once: both sides stay in the cache."""


def compare_values(
    source: Checkpoint,
    target: Checkpoint,
    *,
    layers: int | None = None,
    workers: int | None = None,
    max_memory: int | None = None,
    statistics: bool = False,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> ValuesReport:
    """Compare every element, or those of the first `layers` layers and of no layer.

    With `statistics`, collect what a report shows beside the differences. Each step is compared by
    one of `ranks`, and all have the same result. Raises InputError if the two models have
    different sizes.
    """
    ours, theirs = source.config.numbers, target.config.numbers
    for key in ours:
        if key != "max_position_embeddings" and ours[key] != theirs[key]:
            raise InputError(f"{target.root}: {key} is {theirs[key]}, SOURCE has {ours[key]}")
    model = load_model()
    stored = _stored(source), _stored(target)

    plan = make_plan(model, model.sizes(ours), *stored)

    def judge(number: int, pair: StepPair) -> Compared:
        ranks.check()
        return _compare(number, pair, statistics)

    def explain(number: int, pair: StepPair) -> Explained:
        ranks.check()
        return _explain(number, pair, statistics)

    def judged(numbers: list[int], judge: Judge[T], kind: type[T], whole: bool) -> list[T]:
        dealt = balanced([volume(plan.steps[n].box) for n in numbers], ranks.size)
        found = judge_steps(
            plan,
            [n for n, rank in zip(numbers, dealt, strict=True) if rank == ranks.rank],
            judge,
            workers=workers,
            max_memory=max_memory,
            progress=progress,
            whole=whole,
            processes=ranks.local_size,
            changes=merges_of(*source.updates),
            readings=_readings(source),
        )
        if ranks.size == 1:
            return found
        told = ranks.gather([to_json(one) for one in found])
        return [from_json(kind, one) for part in told for one in part]

    numbers = [n for n, step in enumerate(plan.steps) if layers is None or step.layer < layers]
    compared = judged(numbers, judge, Compared, False)
    compared.sort(key=lambda result: result.step)
    apart = [plan.steps[one.step] for one in compared if one.differing]
    explained: list[Explained] = []
    if apart:
        # Known mistakes are mistakes of whole experts; that nothing differs, pieces of them show.
        explained = judged(_reached(plan, apart, statistics), explain, Explained, True)
    return summed_up(plan, compared, sorted(explained, key=lambda one: one.step))


def _reached(plan: Plan, steps: Iterable[Step], whole_layers: bool) -> list[int]:
    """The numbers of a plan's steps that hold experts of which these steps hold a part; of weights
    without experts, or with `whole_layers` of all, whatever the layer has."""

    def experts(step: Step) -> Iterable[tuple[str, int | None, int]]:
        axes = step.family.axes
        apart = "expert" in axes and not whole_layers
        numbers = range(*step.box[axes.index("expert")]) if apart else (0,)
        return ((*place_of(step), number) for number in numbers)

    reached = {one for step in steps for one in experts(step)}
    return [n for n, step in enumerate(plan.steps) if not reached.isdisjoint(experts(step))]


def _stored(checkpoint: Checkpoint) -> list[Extent]:
    """The extents of the weights themselves: a sidecar's scales are no values."""
    found = checkpoint.extents()
    held = {extent.param for extent in found}
    lone = {
        param
        for family in load_model().families.values()
        for encoding in family.encodings
        if family.stored(held) is not encoding
        for param in encoding.params
    }
    return [extent for extent in found if extent.param not in lone]


def _readings(source: Checkpoint) -> dict[str, Changes]:
    """What would be of the source's adapter otherwise: nothing, or another reading of its file."""
    if source.adapter is None:
        return {}
    # Loaded where there is an adapter, as by whoever opened it.
    from gptoss_convert.formats.adapters.opening import other_readings

    read = other_readings(source.adapter, source.config.numbers)
    arithmetic = source.updates[1]
    return {
        UNMERGED: Changes(),
        **{name: merges_of(one.updates, arithmetic) for name, one in read.items()},
    }


def _compare(number: int, pair: StepPair, statistics: bool) -> Compared:
    """What differs in a step; what does is read once more, to say where."""
    mark = pair.ours.summed()
    share = mark.fingerprint or 0
    found, finite = Compared(number, 0, None, None, share, share), mark.finite
    theirs: Parts = {}  # Blocks and scales are read in one piece.
    for piece in pair.pieces():
        theirs = piece.theirs.parts
        if not piece.same():
            found, more = _differing(number, pair, share)
            finite = finite and more
            break
    if not statistics:
        return found
    # What is no number is rare: only then is it worth a pass of its own.
    parts = () if finite else (one for piece in pair.pieces() for one in piece.values())
    nonfinite = sum(distance(a, b).nonfinite for _, a, b in parts)
    return replace(
        found, statistics=step_statistics(pair.step, nonfinite, [pair.ours.parts, theirs])
    )


def _differing(number: int, pair: StepPair, share: int) -> tuple[Compared, bool]:
    """What differs in a step in which something does, and whether all of TARGET's is finite."""
    differing, theirs, finite = 0, 0, True
    elements: list[Element] = []
    for piece in pair.pieces():
        for part, a, b in piece.values():
            count, first, worst = _apart(part, a.reshape(-1), b.reshape(-1))
            differing += count
            elements += filter(None, (first, worst))
            more, odd = examined(b, part.box, part.lengths, part.layer_axis)
            theirs, finite = theirs + more & MASK, finite and not odd
    # None are left if a file changed meanwhile, which is found out at the end.
    first = min(elements, key=lambda one: one.index, default=None)
    worst = min(elements, key=lambda one: (-one.ulps, one.index), default=None)
    return Compared(number, differing, first, worst, share, theirs), finite


def _explain(number: int, pair: StepPair, statistics: bool) -> Explained:
    """Which known mistake makes one side of the other, and how far they lie apart."""
    step = pair.step
    ((_, ours, theirs),) = (one for piece in pair.pieces() for one in piece.values())
    explained = None
    if not equal(ours, theirs):  # For a report, a layer is gone through where it is equal, too.
        explained = looks(step, ours, theirs)
        if explained is None and (readings := pair.readings()):
            explained = looks_merged(step, ours, theirs, readings)
    digests = expert_digests(step, ours, theirs)
    found = Explained(number, *place_of(step), explained, digests)
    return replace(found, distances=distances_of(step, ours, theirs)) if statistics else found


def _apart(step: Step, a: Bits, b: Bits) -> tuple[int, Element | None, Element | None]:
    """How many elements differ, the first of them, and the one that is furthest off."""
    count = 0
    first: Element | None = None
    worst: Element | None = None
    for start in range(0, len(a), _AT_ONCE):
        x, y = a[start : start + _AT_ONCE], b[start : start + _AT_ONCE]
        places = np.flatnonzero(x != y)
        if not places.size:
            continue
        count += places.size
        distance = np.abs(_ordered(x[places]) - _ordered(y[places]))
        furthest = int(distance.argmax())
        if first is None:
            first = _element(step, start + int(places[0]), a, b, int(distance[0]))
        if worst is None or int(distance[furthest]) > worst.ulps:
            worst = _element(step, start + int(places[furthest]), a, b, int(distance[furthest]))
    return count, first, worst


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

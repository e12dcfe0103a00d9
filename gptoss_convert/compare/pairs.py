"""Two checkpoints side by side: each box of each weight as both sides' BF16 bits, streamed.

Memory is bounded as in a conversion, and each byte is read once.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property, partial
from typing import Literal, TypeVar

from gptoss_convert.codecs.mxfp4.axes import pieces as cuts
from gptoss_convert.compare.arrays import equal
from gptoss_convert.compare.diagnosis import Bits
from gptoss_convert.compare.merge_diagnosis import Readings
from gptoss_convert.engine.buffers import Part, Parts, StepReader, joined, scratch
from gptoss_convert.engine.changes import Changes
from gptoss_convert.engine.derivations import Change, Recipe, choose
from gptoss_convert.engine.fingerprint import examined
from gptoss_convert.engine.records import Digest
from gptoss_convert.engine.steps import Plan, Step
from gptoss_convert.engine.work import Work
from gptoss_convert.layouts.extents import Extent, overlap, volume
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import Family
from gptoss_convert.machine import resources
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.threads import run_all

T = TypeVar("T")
Recipes = Mapping[str, Recipe]
"""By weight, how its values come of what one side stores."""
_PIECE = 1 << 20
"""Values that are decoded at once where two sides differ."""


class _Side:
    """What one side holds of a step."""

    def __init__(self, step: Step, held: Parts, recipe: Recipe) -> None:
        self.parts = held
        self.recipe = recipe
        self.changed = len(recipe.by_piece) > 1
        """Whether the weight is more than copied or decoded."""
        self.work = Work(step, held, {})
        self.work.run(recipe.first)
        self.encoding = recipe.family.stored(held)
        """Of which blocks and scales are held, None where values are."""

    def values(self, piece: Step, arena: Arena) -> Bits:
        """A piece as BF16 bits, contiguous, in the order of the weight's axes."""
        weight = piece.family.weight
        for part in () if self.changed else self.work.held.get(weight, ()):
            if overlap(part.box, piece.box) == piece.box:
                found = part.view(piece.box)
                if found.flags.c_contiguous:
                    return found
        room = scratch(next(iter(self.parts.values()))[0], piece.box, arena)
        Work(piece, self.work.held, {weight: [room]}).run(self.recipe.by_piece)
        return room.array


class StepPair:
    """Both sides of one step, as they were read; what else is asked for is made then."""

    def __init__(
        self,
        step: Step,
        ours: _Side,
        theirs: _Side,
        arena: Arena,
        limit: int | None,
        others: Mapping[str, Recipe],
    ) -> None:
        self.step = step
        self.parts = ours.parts, theirs.parts
        self._ours, self._theirs = ours, theirs
        self._arena = arena
        self._mark = arena.mark()
        self._limit = limit
        self._others = others
        self._made: tuple[Box, Bits, Bits] | None = None

    def pieces(self) -> Iterator[Step]:
        """The step in pieces of which there is room for both sides' values, in order."""
        step = self.step
        shape = [hi - lo for lo, hi in step.box]
        for cut in cuts(shape, self._limit or max(math.prod(shape), 1)):
            spans = itertools.zip_longest(cut, step.box)
            box = [(lo + one.start, lo + one.stop) if one else (lo, hi) for one, (lo, hi) in spans]
            yield step.part(tuple(box))

    def values(self, piece: Step) -> tuple[Bits, Bits]:
        """Both sides of a piece as BF16 bits, contiguous, in the order of the weight's axes, until
        those of another piece are asked for; one array where they hold the same blocks."""
        if self._made is None or self._made[0] != piece.box:
            self._arena.rewind(self._mark)
            ours = self._ours.values(piece, self._arena)
            theirs = ours if self._same_blocks else self._theirs.values(piece, self._arena)
            self._made = piece.box, ours, theirs
        return self._made[1:]

    def whole(self) -> tuple[Bits, Bits]:
        """The values of the whole step, where there is room for them."""
        return self.values(self.step)

    def same(self) -> bool:
        """Whether both sides hold the same values, bit by bit; for that, nothing is decoded to
        memory unless one side's values are changed on the way."""
        ours, theirs = self._ours, self._theirs
        if not ours.changed:
            if self._same_blocks:
                return True
            if ours.encoding is None and theirs.encoding is None:
                return _same_parts(*(side.work.held[self._weight] for side in (ours, theirs)))
            if ours.encoding is None:
                ours, theirs = theirs, ours
            if ours.encoding and not theirs.encoding:
                held = joined(theirs.work.held[self._weight])
                if all(_whole_blocks(part.box[-1], self.step) for part in held):
                    return all(ours.work.stands_for(ours.encoding, part) for part in held)
        return all(equal(*self.values(piece)) for piece in self.pieces())

    def fingerprint(self) -> Digest:
        """Of the first side's values, those of an adapter's merge included."""
        if not self._ours.changed:
            return self._ours.work.summed(self._ours.encoding)
        step = self.step
        found = examined(self.whole()[0], step.box, step.lengths, step.layer_axis)
        return Digest(found[0], not found[1])

    def readings(self) -> Readings:
        """What the weight would be if what changes it did otherwise; computed when asked for."""
        if not self._ours.changed:
            return {}
        return {name: partial(self._otherwise, recipe) for name, recipe in self._others.items()}

    def _otherwise(self, recipe: Recipe) -> Bits:
        """The step's weight by another recipe, which takes room for no longer than it is made."""
        mark = self._arena.mark()
        values = _Side(self.step, self._ours.parts, recipe).values(self.step, self._arena).copy()
        self._arena.rewind(mark)
        return values

    @property
    def _weight(self) -> str:
        return self.step.family.weight

    @cached_property
    def _same_blocks(self) -> bool:
        """Whether both sides hold the weight encoded, in the same boxes, byte by byte the same."""
        ours, theirs = self.parts
        if self._ours.changed or self._weight in ours or ours.keys() != theirs.keys():
            return False
        return all(
            [part.box for part in parts] == [part.box for part in theirs[name]]
            and all(equal(a.array, b.array) for a, b in zip(parts, theirs[name], strict=True))
            for name, parts in ours.items()
        )


def _same_parts(ours: Sequence[Part], theirs: Sequence[Part]) -> bool:
    common = ((a, b, overlap(a.box, b.box)) for a in joined(ours) for b in joined(theirs))
    return all(equal(a.view(box), b.view(box)) for a, b, box in common if box)


def _whole_blocks(span: tuple[int, int], step: Step) -> bool:
    return not any(end % step.family.block for end in span)


Judge = Callable[[int, StepPair], T]
"""What is to be known of one step: its number, and both sides."""


def judge_steps(
    plan: Plan,
    numbers: Sequence[int],
    judge: Judge[T],
    *,
    workers: int | None,
    max_memory: int | None,
    progress: Progress,
    whole: bool = False,
    processes: int = 1,
    changes: Changes | None = None,
    readings: Mapping[str, Changes] | None = None,
) -> list[T]:
    """What `judge` says of the steps of these numbers, in any order; the plan leads to the
    second side.

    With `whole`, or with changes, there is room for the values of whole steps. The first side's
    values are those after the `changes`; `readings` are other changes of it, by name, which the
    judge may ask for. So many `processes` compare on this machine. Raises ResourceError where
    memory is too small for one step.
    """
    changes = changes or Changes()
    limit = None if whole or changes.by_weight else _PIECE
    room = max((_room(step, changes, limit) for step in plan.steps), default=0)
    each = room + changes.worker_bytes
    count = resources.choose_workers(each, max_memory, workers, processes, changes.shared_bytes)
    ours = _recipes(plan.steps, "sources", changes.by_weight)
    theirs = _recipes(plan.steps, "targets", {})
    others = {
        name: _recipes(plan.steps, "sources", one.by_weight)
        for name, one in (readings or {}).items()
    }

    def worker() -> Callable[[int], tuple[T, int]]:
        reader = StepReader(files, room)

        def run(number: int) -> tuple[T, int]:
            step = plan.steps[number]
            weight = step.family.weight
            reader.begin()
            held, read = reader.read(step, step.sources)
            other, more = reader.read(step, step.targets)
            sides = _Side(step, held, ours[weight]), _Side(step, other, theirs[weight])
            otherwise = {name: recipes[weight] for name, recipes in others.items()}
            return judge(
                number, StepPair(step, *sides, reader.arena, limit, otherwise)
            ), read + more

        return run

    judged: list[T] = []
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles())
        share = len(numbers) / max(len(plan.steps), 1)
        total = int((plan.read_bytes + plan.write_bytes) * share)
        advance = stack.enter_context(progress.phase("comparing", total, len(numbers)))
        run_all(numbers, worker, workers=count, finished=judged.extend, advance=advance)
        files.require_unchanged()
    return judged


def _recipes(
    steps: Iterable[Step],
    side: Literal["sources", "targets"],
    changes: Mapping[str, Sequence[Change]],
) -> Recipes:
    held: dict[str, dict[str, list[Extent]]] = defaultdict(lambda: defaultdict(list))
    families: dict[str, Family] = {}
    for step in steps:
        families[step.family.weight] = step.family
        for extent in getattr(step, side):
            held[step.family.weight][extent.param].append(extent)
    return {
        weight: choose(families[weight], found, [weight], changes.get(weight, ()))
        for weight, found in held.items()
    }


def _room(step: Step, changes: Changes, limit: int | None) -> int:
    """Bytes of buffer for both sides of a step as they are read, for a piece of either as values,
    and for what a weight that is changed would be otherwise."""
    count = 3 if changes.by_weight.get(step.family.weight) else 2
    piece = min(volume(step.box), limit or volume(step.box))
    return step.source_bytes() + step.target_bytes() + count * (2 * piece + PAGE)

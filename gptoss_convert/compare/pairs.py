"""Two checkpoints side by side, streamed: each box of each weight is compared where it lies.

Values are decoded to memory only where the sides differ, pack other blocks or cut them, or where
somebody asks for them. Memory is bounded as in a conversion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product
from typing import Literal, TypeVar

from gptoss_convert.compare.arrays import equal
from gptoss_convert.compare.diagnosis import Bits
from gptoss_convert.compare.merge_diagnosis import Readings
from gptoss_convert.engine.buffers import Part, Parts, StepReader, cuts, joined, scratch, within
from gptoss_convert.engine.changes import Changes
from gptoss_convert.engine.derivations import Change, Copy, Derivation, Recipe, choose
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
_AT_ONCE = 1 << 20
"""Values that are decoded to memory at once, where two sides differ."""


class _Side:
    """What one side holds of a step: blocks and scales, or values."""

    def __init__(self, step: Step, held: Parts, recipe: Recipe, arena: Arena) -> None:
        self.parts = held
        self._weight = step.family.weight
        self._work = Work(step, held, {})
        self._work.run(recipe.first)
        self._chain = recipe.by_piece
        """Makes values of what is held."""
        if _is_changed(recipe):
            self._work.held[self._weight] = [_made(step, self._work.held, self._chain, arena)]
            own = frozenset({self._weight})
            self._chain = (Copy(own, own),)  # The changes have been made.
        packed = self._weight not in self._work.held
        self.encoding = recipe.family.stored(held) if packed else None
        """Of which blocks and scales are held, None where values are."""

    @property
    def values(self) -> Sequence[Part]:
        """The weight's values, if no blocks are held."""
        return self._work.held[self._weight]

    def summed(self) -> Digest:
        """The fingerprint of all that is held."""
        return self._work.summed(self.encoding)

    def stands_for(self, values: Part) -> bool:
        """Whether the blocks that are held decode to exactly these values."""
        assert self.encoding is not None
        return self._work.stands_for(self.encoding, values)

    def of(self, piece: Step, arena: Arena) -> Bits:
        """A piece as BF16 bits, contiguous, in the order of the weight's axes."""
        for part in () if self.encoding else self.values:
            if overlap(part.box, piece.box) == piece.box:
                found = part.view(piece.box)
                if found.flags.c_contiguous:
                    return found
        return _made(piece, self._work.held, self._chain, arena).array


def _made(step: Step, held: Parts, chain: Iterable[Derivation], arena: Arena) -> Part:
    """The weight's values, in memory of their own."""
    room = scratch(next(iter(held.values()))[0], step.box, arena)
    Work(step, held, {step.family.weight: [room]}).run(chain)
    return room


@dataclass(frozen=True)
class Piece:
    """Both sides of a step, or of a part of it, as they were read."""

    step: Step
    ours: _Side
    theirs: _Side
    arena: Arena
    mark: int
    """Where the arena is free."""
    whole: bool
    """Whether there is room for all values of both sides at once."""

    def same(self) -> bool:
        """Whether both sides hold the same values, bit by bit."""
        ours, theirs = self.ours, self.theirs
        if ours.encoding and theirs.encoding:
            return self._same_blocks or all(equal(a, b) for _, a, b in self.values())
        if not (ours.encoding or theirs.encoding):
            return _same_parts(self.step.box, ours.values, theirs.values)
        packed, other = (ours, theirs) if ours.encoding else (theirs, ours)
        held = within(joined(other.values), self.step.box)
        if all(_whole_blocks(part.box[-1], self.step) for part in held):
            return all(packed.stands_for(part) for part in held)
        return all(equal(a, b) for _, a, b in self.values())

    def values(self) -> Iterator[tuple[Step, Bits, Bits]]:
        """(what, both sides as BF16 bits, contiguous, in the order of the weight's axes), one part
        after the other in the same memory; one array where both hold the same blocks."""
        for part in cuts(self.step, volume(self.step.box) if self.whole else _AT_ONCE):
            self.arena.rewind(self.mark)
            ours = self.ours.of(part, self.arena)
            yield part, ours, ours if self._same_blocks else self.theirs.of(part, self.arena)

    @cached_property
    def _same_blocks(self) -> bool:
        """Whether both sides hold the weight encoded, in the same boxes, byte by byte the same."""
        ours, theirs = self.ours.parts, self.theirs.parts
        if not (self.ours.encoding and self.theirs.encoding) or ours.keys() != theirs.keys():
            return False
        return all(
            [part.box for part in parts] == [part.box for part in theirs[name]]
            and all(equal(a.array, b.array) for a, b in zip(parts, theirs[name], strict=True))
            for name, parts in ours.items()
        )


class StepPair:
    """One step: what the first side holds of it, and both sides piece by piece."""

    def __init__(
        self,
        step: Step,
        reader: StepReader,
        recipes: Sequence[Recipe],
        others: Mapping[str, Recipe],
        whole: bool,
    ) -> None:
        self.step = step
        self._reader = reader
        self._whole = whole
        self._others = others
        self._recipe, self._other_recipe = recipes
        reader.begin()
        held, _ = reader.read(step, step.sources)
        self.ours = _Side(step, held, self._recipe, reader.arena)
        self._mark = reader.arena.mark()

    def pieces(self) -> Iterator[Piece]:
        """The step in pieces that follow one another in the second side's files, which are read
        one after the other into the same memory; or the whole step, if there is room for it."""
        arena = self._reader.arena
        for part in (self.step,) if self._whole else self.step.pieces():
            arena.rewind(self._mark)
            held, _ = self._reader.read(part, self.step.targets)
            theirs = _Side(part, held, self._other_recipe, arena)
            yield Piece(part, self.ours, theirs, arena, arena.mark(), self._whole)

    def readings(self) -> Readings:
        """What the weight would be if what changes it did otherwise; computed when asked for."""
        if not _is_changed(self._recipe):
            return {}
        return {name: partial(self._otherwise, recipe) for name, recipe in self._others.items()}

    def _otherwise(self, recipe: Recipe) -> Bits:
        """The step's weight by another recipe, which takes room for no longer than it is made."""
        arena = self._reader.arena
        mark = arena.mark()
        values = _Side(self.step, self.ours.parts, recipe, arena).of(self.step, arena).copy()
        arena.rewind(mark)
        return values


def _is_changed(recipe: Recipe) -> bool:
    """Whether a weight is more than copied or decoded."""
    return len(recipe.by_piece) > 1


def _same_parts(box: Box, ours: Sequence[Part], theirs: Sequence[Part]) -> bool:
    sides = product(*(within(joined(side), box) for side in (ours, theirs)))
    common = ((a, b, overlap(a.box, b.box)) for a, b in sides)
    return all(equal(a.view(held), b.view(held)) for a, b, held in common if held)


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

    With `whole` there is room for all values of a step, which then is one piece. The first side's
    values are those after the `changes`; `readings` are other changes of it, by name, which the
    judge of whole steps may ask for. So many `processes` compare on this machine. Raises
    ResourceError where memory is too small for one step.
    """
    changes = changes or Changes()
    room = max((_room(step, changes, whole) for step in plan.steps), default=0)
    each = room + changes.worker_bytes
    shared = changes.shared_bytes + plan.own_bytes
    count = resources.choose_workers(each, max_memory, workers, processes, shared)
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
            otherwise = {
                name: recipes[weight]
                for name, recipes in others.items()
                if _is_changed(ours[weight])
            }
            pair = StepPair(step, reader, (ours[weight], theirs[weight]), otherwise, whole)
            return judge(number, pair), step.moved_bytes()

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


def _room(step: Step, changes: Changes, whole: bool) -> int:
    """Bytes of buffer for what is read of a step, for values of both sides, and for those of a
    weight that is changed, as it is and, of whole steps, as it would be otherwise."""
    changed = bool(changes.by_weight.get(step.family.weight))
    values = 2 * volume(step.box) + PAGE
    if whole:
        return step.source_bytes() + step.target_bytes() + (2 + changed) * values
    read = step.source_bytes() + max(piece.target_bytes() for piece in step.pieces())
    return read + changed * values + 2 * min(values, 2 * _AT_ONCE + PAGE)

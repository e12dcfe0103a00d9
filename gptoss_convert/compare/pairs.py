"""Two checkpoints side by side: each box of each weight as both sides' BF16 bits, streamed.

Memory is bounded as in a conversion, and each byte is read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Generic, Literal, TypeVar

from gptoss_convert.compare.arrays import equal
from gptoss_convert.compare.diagnosis import Bits
from gptoss_convert.compare.merge_diagnosis import Readings
from gptoss_convert.engine.buffers import Parts, StepReader, scratch
from gptoss_convert.engine.changes import Changes
from gptoss_convert.engine.derivations import Change, Recipe, choose
from gptoss_convert.engine.steps import Plan, Step
from gptoss_convert.engine.work import Work
from gptoss_convert.layouts.extents import Extent, volume
from gptoss_convert.layouts.model import Family
from gptoss_convert.machine import resources
from gptoss_convert.machine.arena import PAGE
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.threads import run_all

T = TypeVar("T")
Recipes = Mapping[str, Recipe]
"""By weight, how its values come of what one side stores."""


@dataclass(frozen=True, slots=True)
class Side:
    """What one side holds of a step."""

    values: Bits
    """The weight as BF16 bits, contiguous, in the order of its axes; one array for both sides
    where they hold the same blocks and scales."""
    parts: Parts
    """The same as it was read: BF16, or blocks and scales."""
    readings: Readings = field(default_factory=dict)
    """What the weight would be if what changes it did otherwise; computed when asked for."""


Judge = Callable[[int, Step, Side, Side], T]
"""What is to be known of one step: its number, the step, and both sides."""


def judge_steps(
    plan: Plan,
    numbers: Sequence[int],
    judge: Judge[T],
    *,
    workers: int | None,
    max_memory: int | None,
    progress: Progress,
    processes: int = 1,
    changes: Changes | None = None,
    readings: Mapping[str, Changes] | None = None,
) -> list[T]:
    """What `judge` says of the steps of these numbers, in any order; the plan leads to the
    second side.

    The first side's values are those after the `changes`; `readings` are other changes of it, by
    name, which the judge may ask for. So many `processes` compare on this
    machine. Raises ResourceError where memory is too small for one step.
    """
    changes = changes or Changes()
    room = max((_room(step, changes) for step in plan.steps), default=0)
    each = room + changes.worker_bytes
    count = resources.choose_workers(each, max_memory, workers, processes, changes.shared_bytes)
    recipes = (
        _recipes(plan.steps, "sources", changes.by_weight),
        _recipes(plan.steps, "targets", {}),
    )
    others = {
        name: _recipes(plan.steps, "sources", one.by_weight)
        for name, one in (readings or {}).items()
    }
    judged: list[T] = []
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles())
        share = len(numbers) / max(len(plan.steps), 1)
        total = int((plan.read_bytes + plan.write_bytes) * share)
        advance = stack.enter_context(progress.phase("comparing", total, len(numbers)))
        run_all(
            numbers,
            lambda: _Worker(plan, recipes, others, StepReader(files, room), judge).run,
            workers=count,
            finished=judged.extend,
            advance=advance,
        )
        files.require_unchanged()
    return judged


class _Worker(Generic[T]):
    def __init__(
        self,
        plan: Plan,
        recipes: Sequence[Recipes],
        others: Mapping[str, Recipes],
        reader: StepReader,
        judge: Judge[T],
    ) -> None:
        self._plan = plan
        self._recipes = recipes
        self._others = others
        self._reader = reader
        self._judge = judge

    def run(self, number: int) -> tuple[T, int]:
        step = self._plan.steps[number]
        self._reader.begin()
        ours, read = self._reader.read(step, step.sources)
        theirs, more = self._reader.read(step, step.targets)
        source, target = (recipes[step.family.weight] for recipes in self._recipes)
        values = self._values(step, ours, source)
        # Equal blocks are equal values, unless one side's are changed on the way.
        same = not _changes(source) and _same_blocks(step, ours, theirs)
        others = values if same else self._values(step, theirs, target)
        readings: Readings = {}
        if _changes(source):
            readings = {
                name: partial(self._otherwise, step, ours, recipes[step.family.weight])
                for name, recipes in self._others.items()
            }
        sides = Side(values, ours, readings), Side(others, theirs)
        return self._judge(number, step, *sides), read + more

    def _otherwise(self, step: Step, held: Parts, recipe: Recipe) -> Bits:
        """The step's weight by another recipe, which takes room for no longer than it is made."""
        mark = self._reader.arena.mark()
        values = self._values(step, held, recipe).copy()
        self._reader.arena.rewind(mark)
        return values

    def _values(self, step: Step, held: Parts, recipe: Recipe) -> Bits:
        """The step's weight as BF16 bits, contiguous, in the order of its axes."""
        weight = step.family.weight
        work = Work(step, held, {})
        work.run(recipe.first)
        for part in () if _changes(recipe) else work.held.get(weight, ()):
            if part.box == step.box and part.array.flags.c_contiguous:
                return part.array
        like = next(iter(held.values()))[0]
        values = scratch(like, step.box, self._reader.arena)
        work.outputs = {weight: [values]}
        work.run(recipe.by_piece)
        return values.array


def _changes(recipe: Recipe) -> bool:
    """Whether a weight is more than copied or decoded."""
    return len(recipe.by_piece) > 1


def _same_blocks(step: Step, ours: Parts, theirs: Parts) -> bool:
    """Whether both sides hold the weight encoded, in the same boxes, byte by byte the same."""
    if step.family.weight in ours or ours.keys() != theirs.keys():
        return False
    return all(
        [part.box for part in parts] == [part.box for part in theirs[name]]
        and all(equal(a.array, b.array) for a, b in zip(parts, theirs[name], strict=True))
        for name, parts in ours.items()
    )


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


def _room(step: Step, changes: Changes) -> int:
    """Bytes of buffer for both sides of a step, as they are read and as contiguous values, and for
    what a weight that is changed would be otherwise."""
    count = 3 if changes.by_weight.get(step.family.weight) else 2
    return step.source_bytes() + step.target_bytes() + count * (2 * volume(step.box) + PAGE)

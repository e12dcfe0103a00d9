"""Two checkpoints side by side: each box of each weight as both sides' BF16 bits, streamed.

Memory is bounded as in a conversion, and each byte is read once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs import mxfp4
from gptoss_convert.compare.diagnosis import Bits
from gptoss_convert.engine.parts import Part, Parts, cast, lay_out, read
from gptoss_convert.engine.steps import Plan, Step, member_box
from gptoss_convert.layouts.extents import overlap, volume
from gptoss_convert.layouts.layout import Box
from gptoss_convert.machine import resources
from gptoss_convert.machine.files import PAGE, Arena, SourceFiles
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.threads import run_all

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Side:
    """What one side holds of a step."""

    values: Bits
    """The weight as BF16 bits, contiguous, in the order of its axes."""
    parts: Parts
    """The same as it was read: BF16, or blocks and scales."""


Judge = Callable[[int, Step, Side, Side], T]
"""What is to be known of one step: its number, the step, and both sides."""


def judge_steps(
    plan: Plan,
    numbers: Sequence[int],
    judge: Judge[T],
    *,
    workers: int | None,
    max_memory: int,
    progress: Progress,
    processes: int = 1,
) -> list[T]:
    """What `judge` says of the steps of these numbers, in any order; the plan leads to the
    second side.

    So many `processes` do so on this machine. Raises ResourceError where memory is too small for
    one step.
    """
    room = max(map(_room, plan.steps), default=0)
    count = resources.choose_workers(room, max_memory, workers, processes)
    judged: list[T] = []
    with ExitStack() as stack:
        files = stack.enter_context(SourceFiles())
        share = len(numbers) / max(len(plan.steps), 1)
        total = int((plan.read_bytes + plan.write_bytes) * share)
        advance = stack.enter_context(progress.phase("comparing", total, len(numbers)))
        run_all(
            numbers,
            lambda: _Worker(plan, files, room, judge).run,
            workers=count,
            finished=judged.extend,
            advance=advance,
        )
        files.require_unchanged()
    return judged


class _Worker(Generic[T]):
    def __init__(self, plan: Plan, files: SourceFiles, room: int, judge: Judge[T]) -> None:
        self._plan = plan
        self._files = files
        self._arena = Arena(room)
        self._room = room
        self._judge = judge

    def run(self, number: int) -> tuple[T, int]:
        step = self._plan.steps[number]
        self._arena.reset(self._room)
        nbytes = 0
        sides: list[Side] = []
        for extents in (step.sources, step.targets):
            held: dict[str, list[Part]] = defaultdict(list)
            for part in lay_out(step, extents, self._arena):
                nbytes += read(part, self._files, self._arena)
                cast(part)
                held[part.extent.param].append(part)
            sides.append(Side(self._values(step, held), held))
        return self._judge(number, step, *sides), nbytes

    def _values(self, step: Step, held: Mapping[str, Sequence[Part]]) -> Bits:
        """The step's weight as BF16 bits, contiguous, in the order of its axes."""
        family = step.family
        shape = tuple(hi - lo for lo, hi in step.box)
        position = self._arena.take(2 * volume(step.box), 0)
        values = np.ndarray(shape, np.uint16, self._arena.memory, position)
        if family.weight in held:
            for part in held[family.weight]:
                if part.box == step.box and part.array.flags.c_contiguous:
                    return part.array
                _copy_into(values, step.box, part)
            return values
        blocks, scales = family.blocks or "", family.scales or ""
        mxfp4.decode(
            _whole(held[blocks], member_box(family, blocks, step.box)),
            _whole(held[scales], member_box(family, scales, step.box)),
            values,
        )
        return values


def _room(step: Step) -> int:
    """Bytes of buffer for both sides of a step, as they are read and as contiguous values."""
    return step.source_bytes() + step.target_bytes() + 2 * (2 * volume(step.box) + PAGE)


def _copy_into(values: npt.NDArray[Any], box: Box, part: Part) -> None:
    if common := overlap(box, part.box):
        inside = tuple(slice(lo - b, hi - b) for (lo, hi), (b, _) in zip(common, box, strict=True))
        mxfp4.copy(part.view(common), values[inside])


def _whole(parts: Sequence[Part], box: Box) -> npt.NDArray[Any]:
    if len(parts) == 1:
        return parts[0].view(box)
    values = np.empty(tuple(hi - lo for lo, hi in box), parts[0].array.dtype)
    for part in parts:
        _copy_into(values, box, part)
    return values

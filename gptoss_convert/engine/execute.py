"""Executing a plan: symmetric workers, each taking the next step: read, compute, write, digest."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from isal import isal_zlib

from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.engine.anomalies import examine, made_odd
from gptoss_convert.engine.buffers import (
    Parts,
    StepReader,
    byte_ranges,
    cuts,
    lay_out,
    scratch,
    within,
)
from gptoss_convert.engine.fingerprint import MASK
from gptoss_convert.engine.records import Anomalies, Digest, Done, Effect, Region
from gptoss_convert.engine.steps import Plan, Step
from gptoss_convert.engine.work import Work
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.machine.files import ByteSource
from gptoss_convert.machine.target_files import TargetFiles
from gptoss_convert.machine.threads import run_all


def execute(
    plan: Plan,
    steps: Iterable[int],
    sources: ByteSource,
    targets: TargetFiles,
    *,
    workers: int,
    finished: Callable[[list[Done]], None],
    advance: Callable[[int], None],
    interrupt: Callable[[], None] = lambda: None,
    every: float = 2.0,
) -> None:
    """Run the steps of these numbers on `workers` threads; see `run_all`."""
    run_all(
        steps,
        lambda: _Worker(plan, sources, targets).run,
        workers=workers,
        finished=finished,
        advance=advance,
        interrupt=interrupt,
        every=every,
    )


_AT_ONCE = 1 << 21
"""Values encoded at once: they are in the cache when they are summed up."""


class _Worker:
    def __init__(self, plan: Plan, sources: ByteSource, targets: TargetFiles) -> None:
        self._plan = plan
        self._targets = targets
        self._reader = StepReader(sources, plan.buffer_bytes)
        self._arena = self._reader.arena

    def run(self, number: int) -> tuple[Done, int]:
        """Do one step; returns what it did, and the bytes it read and wrote."""
        step = self._plan.steps[number]
        self._reader.begin()
        held, nbytes = self._reader.read(step, step.sources)
        weight, beside = step.split_targets()
        outputs = lay_out(step, beside, self._arena)
        work = Work(step, held, {**outputs, **self._scratch(step, held)})
        effect = work.run(step.recipe.first)
        held = dict(work.held)
        if step.recipe.by_rows:
            more, digests = self._encode(work)
        else:
            more = work.run(step.recipe.whole)
            digests = [] if weight else [work.digest(more.encoded)]
        effect += more
        scales = work.statistics()
        written = _Written()
        self._write(outputs, written)
        made: list[Anomalies] = []
        if weight:
            digests, more = self._make_weight(step, held, weight, written, made)
            effect += more
        marks = [one.fingerprint for one in digests if one.fingerprint is not None]
        mark = sum(marks) & MASK if marks else None
        anomalies = examine(work, all(one.finite for one in digests))
        if made and not anomalies.nonfinite:
            anomalies = replace(made[0], zeros=anomalies.zeros)
        regions = written.regions()
        nbytes += sum(region.length for region in regions)
        done = Done(number, regions, mark, scales, effect.encoded, effect.cast_values, anomalies)
        return done, nbytes

    def _encode(self, work: Work) -> tuple[Effect, list[Digest]]:
        """Encode some rows after others, and sum up their values while they are in the cache."""
        effect, digests = Effect(), []
        for part in cuts(work.step, _AT_ONCE):
            outputs = {
                param: within(held, part.box_of(param)) for param, held in work.outputs.items()
            }
            rows = Work(part, work.held, outputs)
            made = rows.run(part.recipe.whole)
            effect += made
            digests.append(rows.digest(made.encoded))
        work.made(*work.outputs)
        return effect, digests

    def _make_weight(
        self,
        step: Step,
        held: Parts,
        weight: Sequence[Extent],
        written: _Written,
        odd: list[Anomalies],
    ) -> tuple[list[Digest], Effect]:
        """Make and write the target's weight, one piece after the other in the same memory."""
        digests: list[Digest] = []
        effect = Effect()
        mark = self._arena.mark()
        for piece in step.pieces():
            self._arena.rewind(mark)
            outputs = lay_out(piece, weight, self._arena)
            part = Work(piece, held, outputs)
            effect += part.run(piece.recipe.by_piece)
            digests.append(part.digest(EncodeStats()))
            if not digests[-1].finite:
                odd.append(made_odd(part))
            self._write(outputs, written)
        return digests, effect

    def _scratch(self, step: Step, held: Parts) -> Parts:
        """A place for the weight's values where the target does not take them."""
        if not step.recipe.scratch:
            return {}
        like = next(iter(held.values()))[0]
        return {step.family.weight: [scratch(like, step.box, self._arena)]}

    def _write(self, outputs: Parts, written: _Written) -> None:
        memory = memoryview(self._arena.memory)
        for part in itertools.chain(*outputs.values()):
            for offset, position, length in part.byte_ranges():
                written.add(part.extent, offset, memory[position : position + length])
                self._targets.write(part.extent.file.name, offset, length, self._arena, position)


class _Written:
    """The runs of bytes that a step has written; within an extent, pieces follow one another."""

    def __init__(self) -> None:
        self._regions: dict[Extent, list[Region]] = defaultdict(list)

    def add(self, extent: Extent, offset: int, content: memoryview) -> None:
        regions = self._regions[extent]
        before = regions[-1] if regions else None
        if before is not None and before.offset + before.length == offset:
            crc = isal_zlib.crc32(content, before.crc)
            length = before.length + len(content)
            regions[-1] = Region(extent.file.name, before.offset, length, crc)
        else:
            regions.append(Region(extent.file.name, offset, len(content), isal_zlib.crc32(content)))

    def regions(self) -> tuple[Region, ...]:
        return tuple(itertools.chain(*self._regions.values()))


def written_ranges(step: Step) -> set[tuple[str, int, int]]:
    """Every run of bytes that a step writes: file, offset, length."""
    return {
        (extent.file.name, extent.at(box) + skip, length)
        for extent, box in step.parts(step.targets)
        for skip, length in byte_ranges(extent, box)
    }

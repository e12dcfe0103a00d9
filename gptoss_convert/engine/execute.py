"""Executing a plan: symmetric workers, each taking the next step: read, compute, write, digest."""

from __future__ import annotations

import importlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from isal import isal_zlib

from gptoss_convert.codecs import mxfp4
from gptoss_convert.codecs.mxfp4 import jit
from gptoss_convert.engine.anomalies import Oddities, examine
from gptoss_convert.engine.compute import compute, share, statistics
from gptoss_convert.engine.fingerprint import MASK, ScaleStatistics
from gptoss_convert.engine.parts import Part, Parts, cast, lay_out, read, runs
from gptoss_convert.engine.steps import Plan, Step
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.machine.files import Arena, ByteSource, TargetFiles
from gptoss_convert.machine.threads import run_all


@dataclass(frozen=True, slots=True)
class Region:
    """A run of bytes that was written, and its CRC-32."""

    file: str
    offset: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True)
class Done:
    """A finished step: what it wrote, and what its values are."""

    step: int
    """Its number in the plan."""
    regions: tuple[Region, ...]
    fingerprint: int | None
    """The step's share in the fingerprint of its weight and layer, None if it wrote scales only."""
    scales: ScaleStatistics
    encoded: mxfp4.EncodeStats
    cast_values: int
    """Values that a cast to BF16 rounded."""
    oddities: Oddities


def warm() -> None:
    """Load or compile every kernel that a step may call."""
    mxfp4.warm()
    if jit.kernels() is not None:
        importlib.import_module("gptoss_convert.engine.fingerprint_kernels")


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


class _Worker:
    def __init__(self, plan: Plan, sources: ByteSource, targets: TargetFiles) -> None:
        self._plan = plan
        self._sources = sources
        self._targets = targets
        self._arena = Arena(plan.buffer_bytes)

    def run(self, number: int) -> tuple[Done, int]:
        """Do one step; returns what it did, and the bytes it read and wrote."""
        step = self._plan.steps[number]
        self._arena.reset(self._plan.buffer_bytes)
        held: dict[str, list[Part]] = defaultdict(list)
        nbytes = rounded = 0
        for part in lay_out(step, step.sources, self._arena):
            nbytes += read(part, self._sources, self._arena)
            rounded += cast(part)
            held[part.extent.param].append(part)
        written = _Written()
        weight, beside = step.split_targets()
        taken = self._lay_out(step, beside)
        encoded = compute(step, held, taken)
        scales = statistics(step, held, taken)
        self._write(taken, written)
        shares = [] if weight else [share(step, held, taken, encoded)]
        made = self._arena.mark()
        for piece in step.pieces() if weight else ():
            self._arena.rewind(made)
            taken = self._lay_out(piece, weight)
            compute(piece, held, taken)
            shares.append(share(piece, held, taken, encoded))
            self._write(taken, written)
        marks = [one.fingerprint for one in shares if one.fingerprint is not None]
        mark = sum(marks) & MASK if marks else None
        oddities = examine(step, held, all(one.finite for one in shares))
        regions = written.regions()
        nbytes += sum(region.length for region in regions)
        return Done(number, regions, mark, scales, encoded, rounded, oddities), nbytes

    def _lay_out(self, step: Step, extents: Sequence[Extent]) -> dict[str, list[Part]]:
        taken: dict[str, list[Part]] = defaultdict(list)
        for part in lay_out(step, extents, self._arena):
            taken[part.extent.param].append(part)
        return taken

    def _write(self, taken: Parts, written: _Written) -> None:
        memory = memoryview(self._arena.memory)
        for part in itertools.chain(*taken.values()):
            for offset, position, length in part.runs():
                written.add(part.extent, offset, memory[position : position + length])
                self._targets.write(part.extent.file.name, offset, length, self._arena, position)


class _Written:
    """The runs of bytes that a step has written; in an extent, each piece goes on where the one
    before ended."""

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


def places(step: Step) -> set[tuple[str, int, int]]:
    """Every run of bytes that a step writes: file, offset, length."""
    return {
        (extent.file.name, extent.at(box) + skip, length)
        for member in step.family.members
        for extent, box in step.of(step.targets, member)
        for skip, length in runs(extent, box)
    }

"""Executing a plan: symmetric workers, each taking the next step: read, compute, write, digest."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from isal import isal_zlib

from gptoss_convert import mxfp4
from gptoss_convert.compute import Part, cast, compute, decoded, statistics
from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.extents import Extent, volume
from gptoss_convert.files import PAGE, Arena, ByteSource, TargetFiles
from gptoss_convert.fingerprint import ScaleStatistics, fingerprint
from gptoss_convert.layout import Box
from gptoss_convert.steps import Plan, Step

_NUMPY = {"U8": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}


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


def execute(
    plan: Plan,
    steps: Iterable[int],
    sources: ByteSource,
    targets: TargetFiles,
    *,
    workers: int,
    finished: Callable[[list[Done]], None],
    advance: Callable[[int], None],
    every: float = 2.0,
) -> None:
    """Run the steps of these numbers; `finished` gets those done about `every` seconds.

    The first error stops all workers after their current step and is raised here, when everything
    done has been handed over. `advance` is called from the workers with the bytes read and written.
    """
    queue = iter(steps)
    lock = threading.Lock()
    stop = threading.Event()
    done: list[Done] = []
    errors: list[BaseException] = []

    def work() -> None:
        try:
            worker = _Worker(plan, sources, targets)
            while not stop.is_set():
                with lock:
                    number = next(queue, None)
                if number is None:
                    return
                result, nbytes = worker.run(number)
                with lock:
                    done.append(result)
                advance(nbytes)
        except BaseException as error:
            errors.append(error)
            stop.set()

    def hand_over() -> None:
        with lock:
            batch = done[:]
            done.clear()
        if batch:
            finished(batch)

    threads = [threading.Thread(target=work, name=f"worker-{i}") for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(every)
                if thread.is_alive():
                    hand_over()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        hand_over()
    if errors:
        raise errors[0]


class _Worker:
    def __init__(self, plan: Plan, sources: ByteSource, targets: TargetFiles) -> None:
        self._plan = plan
        self._sources = sources
        self._targets = targets
        self._arena = Arena(plan.buffer_bytes)

    def run(self, number: int) -> tuple[Done, int]:
        """Do one step; returns what it did, and the bytes it read and wrote."""
        step = self._plan.steps[number]
        self._arena.reset(sum(step.buffer_bytes()))
        held: dict[str, list[Part]] = defaultdict(list)
        taken: dict[str, list[Part]] = defaultdict(list)
        nbytes = rounded = 0
        for part in self._parts(step, step.sources):
            nbytes += self._read(part)
            rounded += cast(part)
            held[part.extent.param].append(part)
        for part in self._parts(step, step.targets):
            taken[part.extent.param].append(part)
        encoded = compute(step, held, taken)
        scales = statistics(step, held, taken)
        regions = tuple(
            region for part in itertools.chain(*taken.values()) for region in self._write(part)
        )
        shares = [
            fingerprint(bits, box, step.lengths, step.layer_axis)
            for box, bits in decoded(step, held, taken, encoded)
        ]
        share = sum(shares) & ((1 << 64) - 1) if shares else None
        nbytes += sum(region.length for region in regions)
        return Done(number, regions, share, scales, encoded, rounded), nbytes

    def _parts(self, step: Step, extents: Sequence[Extent]) -> Iterator[Part]:
        for member in step.family.members:
            for extent, box in step.of(extents, member):
                first = extent.at(box)
                position = self._arena.take(extent.span(box), first % PAGE)
                array = np.ndarray(
                    tuple(hi - lo for lo, hi in box),
                    _NUMPY[extent.dtype],
                    self._arena.memory,
                    position,
                    extent.strides,
                )
                yield Part(extent, box, position, array)

    def _read(self, part: Part) -> int:
        extent, box = part.extent, part.box
        first, span = extent.at(box), extent.span(box)
        useful = volume(box) * DTYPE_BYTES[extent.dtype]
        if 2 * useful >= span:
            self._sources.read(extent.file, first, span, self._arena, part.position)
        else:
            for skip, length in runs(extent, box):
                self._sources.read(
                    extent.file, first + skip, length, self._arena, part.position + skip
                )
        return useful

    def _write(self, part: Part) -> Iterator[Region]:
        first = part.extent.at(part.box)
        memory = memoryview(self._arena.memory)
        for skip, length in runs(part.extent, part.box):
            position = part.position + skip
            crc = isal_zlib.crc32(memory[position : position + length])
            self._targets.write(part.extent.file, first + skip, length, self._arena, position)
            yield Region(part.extent.file, first + skip, length, crc)


def runs(extent: Extent, box: Box) -> Iterator[tuple[int, int]]:
    """The contiguous byte runs of a box, as (distance from its first element, length)."""
    run = DTYPE_BYTES[extent.dtype]
    outer: list[range] = []
    axes = sorted(
        (stride, hi - lo)
        for (lo, hi), stride in zip(box, extent.strides, strict=True)
        if hi - lo > 1
    )
    for stride, length in axes:
        if stride == run and not outer:
            run *= length
        else:
            outer.append(range(0, stride * length, stride))
    for skips in itertools.product(*reversed(outer)):
        yield sum(skips), run

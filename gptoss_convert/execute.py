"""Executing a plan: symmetric workers, each taking the next step: read, compute, write."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert import mxfp4
from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.errors import CodecError, GptossError
from gptoss_convert.extents import Extent, overlap, volume
from gptoss_convert.files import PAGE, Arena, ByteSource, TargetFiles
from gptoss_convert.layout import Box
from gptoss_convert.model import BLOCK
from gptoss_convert.plan import Plan, Step, member_box

Array = npt.NDArray[Any]
_NUMPY = {"U8": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass(slots=True)
class Part:
    """A box of one parameter in memory, as a strided view whose axes are the parameter's."""

    extent: Extent
    box: Box
    position: int
    array: Array

    def view(self, box: Box) -> Array:
        """The elements of `box`, which lies inside this part."""
        return self.array[
            tuple(
                slice(lo - low, hi - low) for (lo, hi), (low, _) in zip(box, self.box, strict=True)
            )
        ]


@dataclass(slots=True)
class Outcome:
    """What the steps of one weight did beyond moving bits."""

    encoded: mxfp4.EncodeStats = field(default_factory=mxfp4.EncodeStats)
    cast_values: int = 0
    """Values that a cast to BF16 rounded."""

    def add(self, other: Outcome) -> None:
        """Count another outcome in."""
        self.encoded += other.encoded
        self.cast_values += other.cast_values


def execute(
    plan: Plan,
    sources: ByteSource,
    targets: TargetFiles,
    *,
    workers: int,
    advance: Callable[[int], None] = lambda nbytes: None,
) -> dict[str, Outcome]:
    """Run every step once; returns the outcome by weight.

    The first error stops all workers after their current step and is raised here. `advance` is
    called from the workers with the bytes read and written.
    """
    steps = iter(plan.steps)
    lock = threading.Lock()
    stop = threading.Event()
    outcomes: dict[str, Outcome] = defaultdict(Outcome)
    errors: list[BaseException] = []

    def work() -> None:
        worker = _Worker(sources, targets, plan.buffer_bytes)
        try:
            while not stop.is_set():
                with lock:
                    step = next(steps, None)
                if step is None:
                    return
                outcome, nbytes = worker.run(step)
                with lock:
                    outcomes[step.family.weight].add(outcome)
                advance(nbytes)
        except BaseException as error:
            errors.append(error)
            stop.set()

    threads = [threading.Thread(target=work, name=f"worker-{i}") for i in range(workers)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return dict(outcomes)


class _Worker:
    def __init__(self, sources: ByteSource, targets: TargetFiles, buffer_bytes: int) -> None:
        self._sources = sources
        self._targets = targets
        self._arena = Arena(buffer_bytes)

    def run(self, step: Step) -> tuple[Outcome, int]:
        """Do one step; returns what it did, and the bytes it read and wrote."""
        self._arena.reset(sum(step.buffer_bytes()))
        outcome = Outcome()
        held: dict[str, list[Part]] = defaultdict(list)
        taken: dict[str, list[Part]] = defaultdict(list)
        nbytes = 0
        for part in self._parts(step, step.sources):
            nbytes += self._read(part)
            outcome.cast_values += _cast(part)
            held[part.extent.param].append(part)
        for part in self._parts(step, step.targets):
            taken[part.extent.param].append(part)
        outcome.encoded = _compute(step, held, taken)
        for part in itertools.chain.from_iterable(taken.values()):
            nbytes += self._write(part)
        return outcome, nbytes

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

    def _write(self, part: Part) -> int:
        first = part.extent.at(part.box)
        for skip, length in runs(part.extent, part.box):
            self._targets.write(
                part.extent.file, first + skip, length, self._arena, part.position + skip
            )
        return volume(part.box) * DTYPE_BYTES[part.extent.dtype]


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


def _cast(part: Part) -> int:
    """Replace a float32 or float16 part by its BF16 form; returns the values that were rounded."""
    if part.extent.dtype not in {"F32", "F16"}:
        return 0
    rounded = np.empty(part.array.shape, np.uint16)
    changed = mxfp4.cast(part.array, rounded)
    part.array = rounded
    return changed


def _compute(
    step: Step, held: dict[str, list[Part]], taken: dict[str, list[Part]]
) -> mxfp4.EncodeStats:
    family = step.family
    blocks, scales = family.blocks or "", family.scales or ""
    stats = mxfp4.EncodeStats()
    if blocks in taken and blocks not in held:
        stats = _encode(step, held, taken)
    for member, parts in taken.items():
        if member in held and not (member == scales and blocks not in held and blocks in taken):
            for part in parts:
                _copy(held[member], part)
        elif member == family.weight:
            for part in parts:
                _decode(step, held, part)
    return stats


def _copy(sources: Sequence[Part], target: Part) -> None:
    for source in sources:
        if common := overlap(source.box, target.box):
            mxfp4.copy(source.view(common), target.view(common))


def _gather(parts: Sequence[Part], box: Box) -> Array:
    """The elements of `box` as one view: of the part that holds it all, else of a copy."""
    for part in parts:
        if overlap(part.box, box) == box:
            return part.view(box)
    shape = tuple(hi - lo for lo, hi in box)
    whole = Part(parts[0].extent, box, 0, np.empty(shape, parts[0].array.dtype))
    _copy(parts, whole)
    return whole.array


def _decode(step: Step, held: dict[str, list[Part]], target: Part) -> None:
    family = step.family
    lo, hi = target.box[-1]
    blocks_box = member_box(family, family.blocks or "", target.box)
    scales_box = member_box(family, family.scales or "", target.box)
    blocks = _gather(held[family.blocks or ""], blocks_box)
    scales = _gather(held[family.scales or ""], scales_box)
    first = scales_box[-1][0] * BLOCK
    whole = lo == first and hi == scales_box[-1][1] * BLOCK
    values = target.array
    if not whole:
        values = np.empty((*target.array.shape[:-1], scales.shape[-1] * BLOCK), np.uint16)
    try:
        mxfp4.decode(blocks, scales, values)
    except CodecError as error:
        tensor = held[family.scales or ""][0].extent.tensor
        raise CodecError(f"{tensor}: box {_show(scales_box)}: {error}") from None
    if not whole:
        mxfp4.copy(values[..., lo - first : hi - first], target.array)


def _encode(
    step: Step, held: dict[str, list[Part]], taken: dict[str, list[Part]]
) -> mxfp4.EncodeStats:
    family = step.family
    assert family.blocks is not None
    assert family.scales is not None
    values = _gather(held[family.weight], step.box)
    blocks = _room(taken[family.blocks], member_box(family, family.blocks, step.box))
    scales = _room(taken[family.scales], member_box(family, family.scales, step.box))
    hints = None
    if family.scales in held:
        hints = _gather(held[family.scales], scales.box)
    stats = mxfp4.encode(values, blocks.array, scales.array, hints)
    for member, made in ((family.blocks, blocks), (family.scales, scales)):
        for part in taken[member]:
            if made is not part:
                _copy([made], part)
    if stats.nonfinite:
        raise GptossError(
            f"{held[family.weight][0].extent.tensor}: box {_show(step.box)}: "
            f"{stats.nonfinite} values are infinite or NaN"
        )
    return stats


def _room(parts: Sequence[Part], box: Box) -> Part:
    """A place for the elements of `box`: the part that is this box, else one to be copied from."""
    if len(parts) == 1 and parts[0].box == box:
        return parts[0]
    shape = tuple(hi - lo for lo, hi in box)
    return Part(parts[0].extent, box, 0, np.empty(shape, parts[0].array.dtype))


def _show(box: Box) -> str:
    return "[" + ", ".join(str(lo) if hi == lo + 1 else f"{lo}:{hi}" for lo, hi in box) + "]"

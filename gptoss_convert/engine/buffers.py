"""Buffers: boxes of parameters in a worker's memory, read from files and written to them."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs.mxfp4 import axes, relayout
from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.engine.steps import Step
from gptoss_convert.engine.unpacking import Unpacker, array_type
from gptoss_convert.layouts.extents import Extent, overlap, volume
from gptoss_convert.layouts.layout import Box
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.files import ByteSource

Array = npt.NDArray[Any]


@dataclass(slots=True)
class Part:
    """A box of one parameter in memory, as a strided view whose axes are the parameter's."""

    extent: Extent
    box: Box
    position: int
    """Where the array begins in the worker's arena, -1 for an array of its own."""
    array: Array

    def view(self, box: Box) -> Array:
        """The elements of `box`, which lies inside this part."""
        return self.array[
            tuple(
                slice(lo - low, hi - low) for (lo, hi), (low, _) in zip(box, self.box, strict=True)
            )
        ]

    def fill(self, sources: Iterable[Part]) -> None:
        """Copy the elements that the sources hold of this part."""
        for source in sources:
            if common := overlap(source.box, self.box):
                relayout.copy(source.view(common), self.view(common))

    def byte_ranges(self, gap: int = 0) -> Iterator[tuple[int, int, int]]:
        """Its contiguous ranges of bytes, as (byte of the file, position in the arena, length).

        See `byte_ranges` for `gap`.
        """
        first = self.extent.at(self.box)
        for skip, length in byte_ranges(self.extent, self.box, gap):
            yield first + skip, self.position + skip, length


Parts = Mapping[str, Sequence[Part]]
"""By parameter: the parts that hold it, or take it."""


class StepReader:
    """Reads the parts of steps into one worker's memory."""

    def __init__(self, files: ByteSource, room: int) -> None:
        self._files = files
        self._room = room
        self._unpacker: Unpacker | None = None
        self.arena = Arena(room)

    def begin(self, room: int | None = None) -> None:
        """Let go of all that was read before."""
        self.arena.reset(self._room if room is None else room)

    def read(
        self, step: Step, extents: Sequence[Extent], seen: Callable[[Part], None] = lambda _: None
    ) -> tuple[dict[str, list[Part]], int]:
        """(what the extents hold of a step's box, its bytes); `seen` is told of each part."""
        held = lay_out(step, extents, self.arena)
        nbytes = 0
        for part in itertools.chain(*held.values()):
            files = self._files if part.extent.packed is None else self._unpacked(part.extent)
            nbytes += read(part, files, self.arena)
            seen(part)
        return held, nbytes

    def _unpacked(self, extent: Extent) -> ByteSource:
        if self._unpacker is None:
            self._unpacker = Unpacker(self._files)
        return self._unpacker.of(extent)


def cuts(step: Step, limit: int) -> Iterator[Step]:
    """The step in parts of at most so many values, in the order of the weight's elements."""
    for cut in axes.pieces([hi - lo for lo, hi in step.box], limit):
        spans = itertools.zip_longest(cut, step.box)
        box = [(lo + one.start, lo + one.stop) if one else (lo, hi) for one, (lo, hi) in spans]
        yield step.part(tuple(box))


def lay_out(step: Step, extents: Sequence[Extent], arena: Arena) -> dict[str, list[Part]]:
    """By parameter, a place in the arena for each part of the step's box that the extents hold."""
    laid_out: dict[str, list[Part]] = defaultdict(list)
    for extent, box in step.parts(extents):
        position = arena.take(extent.span(box), extent.at(box) % PAGE)
        shape = tuple(hi - lo for lo, hi in box)
        dtype = array_type(extent.dtype)
        array = np.ndarray(shape, dtype, arena.memory, position, extent.strides)
        laid_out[extent.param].append(Part(extent, box, position, array))
    return laid_out


def scratch(like: Part, box: Box, arena: Arena) -> Part:
    """A place in the arena for BF16 values that no file holds, in the order of their axes."""
    position = arena.take(2 * volume(box), 0)
    array = np.ndarray([hi - lo for lo, hi in box], np.uint16, arena.memory, position)
    return Part(like.extent, box, -1, array)


def gather(parts: Sequence[Part], box: Box) -> Array:
    """The elements of `box` as one view: of the part that holds it all, else of a copy."""
    for part in parts:
        if overlap(part.box, box) == box:
            return part.view(box)
    whole = loose(parts[0], box)
    whole.fill(parts)
    return whole.array


def within(parts: Iterable[Part], box: Box) -> list[Part]:
    """What parts hold of a box; those that hold nothing of it are left out."""
    found: list[Part] = []
    for part in parts:
        common = overlap(part.box, box)
        if common is not None and common != part.box:
            view = part.view(common)
            position = part.position + view.ctypes.data - part.array.ctypes.data
            part = Part(part.extent, common, position if part.position >= 0 else -1, view)
        if common is not None:
            found.append(part)
    return found


def loose(like: Part, box: Box) -> Part:
    """An array of its own, outside the arena, for elements of the same kind."""
    array = np.empty([hi - lo for lo, hi in box], like.array.dtype)
    return Part(like.extent, box, -1, array)


def joined(parts: Sequence[Part]) -> Sequence[Part]:
    """The parts as one view where they follow one another along one axis, equally far apart.

    So the two chunks of an expert, gate and up, are converted in one pass instead of two.
    """
    if len(parts) < 2 or any(part.position < 0 for part in parts):
        return parts
    first, second, *_ = ordered = sorted(parts, key=lambda part: part.box)
    differ = [i for i, (a, b) in enumerate(zip(first.box, second.box, strict=True)) if a != b]
    if len(differ) != 1:
        return parts
    (axis,) = differ
    lo, hi = first.box[axis]
    distance = second.position - first.position
    strides = list(first.array.strides)
    if hi - lo == 1:
        strides[axis] = distance
    for number, part in enumerate(ordered):
        span = (lo + number * (hi - lo), hi + number * (hi - lo))
        if (
            part.box != (*first.box[:axis], span, *first.box[axis + 1 :])
            or part.array.strides != first.array.strides
            or part.position != first.position + number * distance
            or distance != strides[axis] * (hi - lo)
            or distance % part.array.itemsize
        ):
            return parts
    box = (*first.box[:axis], (lo, ordered[-1].box[axis][1]), *first.box[axis + 1 :])
    shape = tuple(stop - start for start, stop in box)
    whole = np.lib.stride_tricks.as_strided(first.array, shape, strides)
    return [Part(first.extent, box, first.position, whole)]


def read(part: Part, sources: ByteSource, arena: Arena) -> int:
    """Fill a part from its file; returns the bytes that belong to it."""
    extent, box = part.extent, part.box
    first, span = extent.at(box), extent.span(box)
    useful = volume(box) * DTYPE_BYTES[extent.dtype]
    if 2 * useful >= span:
        sources.read(extent.file, first, span, arena, part.position)
    else:
        for offset, position, length in part.byte_ranges(gap=PAGE):
            sources.read(extent.file, offset, length, arena, position)
    return useful


def byte_ranges(extent: Extent, box: Box, gap: int = 0) -> Iterator[tuple[int, int]]:
    """The contiguous ranges of bytes of a box, as (distance from its first element, length).

    Ranges that are at most `gap` bytes apart are joined, with what lies between them.
    """
    length = DTYPE_BYTES[extent.dtype]
    outer: list[range] = []
    loops = sorted(
        (stride, hi - lo)
        for (lo, hi), stride in zip(box, extent.strides, strict=True)
        if hi - lo > 1
    )
    for stride, count in loops:
        if stride <= length + gap and not outer:
            length += stride * (count - 1)
        else:
            outer.append(range(0, stride * count, stride))
    for skips in itertools.product(*reversed(outer)):
        yield sum(skips), length

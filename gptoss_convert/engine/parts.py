"""Parts: boxes of parameters in a worker's buffer, read from files and written to them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs import mxfp4
from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.engine.steps import Step
from gptoss_convert.layouts.extents import Extent, volume
from gptoss_convert.layouts.layout import Box
from gptoss_convert.machine.files import PAGE, Arena, ByteSource

Array = npt.NDArray[Any]
_NUMPY = {"U8": np.uint8, "BF16": np.uint16, "F16": np.float16, "F32": np.float32}


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

    def runs(self, gap: int = 0) -> Iterator[tuple[int, int, int]]:
        """The contiguous runs of this part, as (byte of the file, position in the arena, length).

        See `runs` for `gap`.
        """
        first = self.extent.at(self.box)
        for skip, length in runs(self.extent, self.box, gap):
            yield first + skip, self.position + skip, length


Parts = Mapping[str, Sequence[Part]]
"""By parameter: the parts that hold it, or take it."""


def lay_out(step: Step, extents: Sequence[Extent], arena: Arena) -> Iterator[Part]:
    """A place in the arena for each part of the step's box that the extents hold."""
    for member in step.family.members:
        for extent, box in step.of(extents, member):
            position = arena.take(extent.span(box), extent.at(box) % PAGE)
            shape = tuple(hi - lo for lo, hi in box)
            dtype = _NUMPY[extent.dtype]
            array = np.ndarray(shape, dtype, arena.memory, position, extent.strides)
            yield Part(extent, box, position, array)


def joined(parts: Sequence[Part]) -> Sequence[Part]:
    """The parts as one view where they follow one another along one axis, equally far apart.

    Chunks that halve an expert, gate and up, are converted in one sweep so, not half by half.
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
        for offset, position, length in part.runs(gap=PAGE):
            sources.read(extent.file, offset, length, arena, position)
    return useful


def runs(extent: Extent, box: Box, gap: int = 0) -> Iterator[tuple[int, int]]:
    """The contiguous byte runs of a box, as (distance from its first element, length).

    Runs that are at most `gap` bytes apart are joined, with what lies between them.
    """
    run = DTYPE_BYTES[extent.dtype]
    outer: list[range] = []
    axes = sorted(
        (stride, hi - lo)
        for (lo, hi), stride in zip(box, extent.strides, strict=True)
        if hi - lo > 1
    )
    for stride, length in axes:
        if stride <= run + gap and not outer:
            run += stride * (length - 1)
        else:
            outer.append(range(0, stride * length, stride))
    for skips in itertools.product(*reversed(outer)):
        yield sum(skips), run


def cast(part: Part) -> int:
    """Replace a float32 or float16 part by its BF16 form; returns the values that were rounded."""
    if part.extent.dtype not in {"F32", "F16"}:
        return 0
    rounded = np.empty(part.array.shape, np.uint16)
    changed = mxfp4.cast(part.array, rounded)
    part.array, part.position = rounded, -1
    return changed

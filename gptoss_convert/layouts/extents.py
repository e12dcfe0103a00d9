"""Extents: where each box of each parameter lies in a checkpoint's files."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from gptoss_convert.containers import DTYPE_BYTES, Chunk, Packed
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.layouts.folding import fold
from gptoss_convert.layouts.layout import STAR, Box, Placement, interval_boxes
from gptoss_convert.layouts.tables import Tensor


@dataclass(frozen=True, slots=True)
class Extent:
    """A box of one parameter in one file: element i lies at `origin + Σ i[axis]·strides[axis]`."""

    param: str
    box: Box
    file: FileRef
    origin: int
    strides: tuple[int, ...]
    """Bytes per axis; 0 for an axis whose index the tensor's name binds."""
    dtype: str
    tensor: str
    alias: bool = False
    packed: Packed | None = None
    """What its values are decoded from: `origin` counts in their bytes."""

    @property
    def files(self) -> tuple[FileRef, ...]:
        """The files that it is read from."""
        if self.packed is None:
            return (self.file,)
        root = self.file.root
        held = (FileRef(root, one.file, one.identity) for _, one in self.packed.members)
        return tuple(dict.fromkeys(held))

    def at(self, box: Box) -> int:
        """Byte offset of the first element of `box`."""
        return self.origin + sum(
            lo * stride for (lo, _), stride in zip(box, self.strides, strict=True)
        )

    def span(self, box: Box) -> int:
        """Bytes from the first to behind the last element of `box`."""
        last = sum(
            (hi - 1 - lo) * stride for (lo, hi), stride in zip(box, self.strides, strict=True)
        )
        return last + DTYPE_BYTES[self.dtype]


def volume(box: Box) -> int:
    """Elements in a box."""
    return math.prod(hi - lo for lo, hi in box)


def overlap(a: Box, b: Box) -> Box | None:
    """The common part of two boxes, None if there is none."""
    common: list[tuple[int, int]] = []
    # A loop, without calls: plans of 120b spend half their time here.
    for (lo, hi), (low, high) in zip(a, b, strict=True):
        if low > lo:
            lo = low
        if high < hi:
            hi = high
        if lo >= hi:
            return None
        common.append((lo, hi))
    return tuple(common)


def disjoint(boxes: Sequence[Box], axis: int = 0) -> bool:
    """Whether no two boxes share an element; about linear for the cells of a grid."""
    if len(boxes) < 2:
        return True
    if axis == len(boxes[0]):
        return False
    edges = sorted({edge for box in boxes for edge in box[axis]})
    slabs: dict[int, list[Box]] = defaultdict(list)
    for box in boxes:
        lo, hi = box[axis]
        for edge in edges[bisect_left(edges, lo) : bisect_left(edges, hi)]:
            slabs[edge].append(box)
    return all(disjoint(slab, axis + 1) for slab in slabs.values())


def extents(
    where: str,
    tensors: Iterable[Tensor],
    chunks: Sequence[Chunk],
    casts: frozenset[str] = frozenset(),
    root: Path = Path(),
) -> list[Extent]:
    """The extents of all chunks; every tensor must be known, present and of the computed shape.

    The chunks' files lie in `root`; `casts` are float dtypes accepted where the table says BF16.
    Raises InputError or IntegrityError that names the tensors, found and expected.
    """
    known = {tensor.name: tensor for tensor in tensors}
    found = {chunk.tensor for chunk in chunks}
    missing = known.keys() - found
    if unknown := found - known.keys():
        # Without any that is missing, they are none of the model's.
        advice = "" if missing else "; --drop PATTERN leaves out what is not the model's"
        raise IntegrityError(f"{where}: {len(unknown)} unknown tensors: {fold(unknown)}{advice}")
    if missing:
        raise IntegrityError(f"{where}: {len(missing)} tensors missing: {fold(missing)}")
    result: list[Extent] = []
    for chunk in chunks:
        tensor = known[chunk.tensor]
        if chunk.shape != tensor.shape:
            raise InputError(
                f"{where}: {chunk.tensor}: layout {tensor.rule.layout.text!r} expects shape "
                f"{tensor.shape}, found {chunk.shape}"
            )
        if chunk.dtype != tensor.dtype and (tensor.dtype != "BF16" or chunk.dtype not in casts):
            raise InputError(
                f"{where}: {chunk.tensor}: expects dtype {tensor.dtype}, found {chunk.dtype}"
                + ("; pass --cast to round it to BF16" if chunk.dtype in {"F32", "F16"} else "")
            )
        result.extend(_chunk_extents(tensor, tensor.whole(chunk), root))
    return result


def _chunk_extents(tensor: Tensor, chunk: Chunk, root: Path) -> Iterator[Extent]:
    file = FileRef(root, chunk.file, chunk.identity)
    steps = [DTYPE_BYTES[chunk.dtype]]
    for length in reversed(chunk.extent[1:]):
        steps.append(steps[-1] * length)
    steps.reverse()
    corner = chunk.offset - sum(
        first * step for first, step in zip(chunk.start, steps, strict=True)
    )
    for placement in tensor.placements:
        strides = tuple(place.step * steps[place.dim] if place else 0 for place in placement.places)
        dim, step, first, _ = placement.star
        origin = corner + first * step * steps[dim]
        for box in _boxes(tensor, chunk, placement):
            yield Extent(
                placement.param,
                box,
                file,
                origin,
                strides,
                chunk.dtype,
                tensor.name,
                tensor.rule.alias,
                chunk.packed,
            )


def _boxes(tensor: Tensor, chunk: Chunk, placement: Placement) -> Iterator[Box]:
    """The boxes of one parameter that a chunk holds: several where it cuts joined axes unevenly."""
    size = dict(zip(placement.axes, placement.sizes, strict=True))
    fixed = {axis: (index, index + 1) for axis, index in tensor.bound.items()}
    choices = [
        [*_dim_ranges(dim, size, placement, start, start + length, whole)]
        for dim, start, length, whole in zip(
            tensor.rule.layout.dims, chunk.start, chunk.extent, chunk.shape, strict=True
        )
    ]
    for choice in product(*choices):
        ranges = fixed | {axis: span for part in choice for axis, span in part.items()}
        yield tuple(ranges[axis] for axis in placement.axes)


def _dim_ranges(
    dim: tuple[str, ...],
    size: Mapping[str, int],
    placement: Placement,
    start: int,
    stop: int,
    whole: int,
) -> Iterator[dict[str, tuple[int, int]]]:
    """The axis ranges that the interval [start, stop) of a dimension covers, for one parameter."""
    if stop - start == whole and STAR not in dim:
        yield {axis: (0, size[axis]) for axis in dim}
        return
    explicit = math.prod(size[axis] for axis in dim if axis != STAR)
    lengths = [whole // explicit if axis == STAR else size[axis] for axis in dim]
    for box in interval_boxes(start, stop, lengths):
        ranges = dict(zip(dim, box, strict=True))
        if STAR not in ranges:
            yield ranges
            continue
        lo, hi = ranges.pop(STAR)
        _, _, first, length = placement.star
        lo, hi = max(lo - first, 0), min(hi - first, length)
        if lo >= hi:
            continue
        axes = placement.star_axes
        for inner in interval_boxes(lo, hi, [size[axis] for axis in axes]):
            yield ranges | dict(zip(axes, inner, strict=True))

"""Whether boxes tile a tensor: each element in exactly one, found in near-linear time."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence

from gptoss_convert.containers.torch_dist.metadata import ChunkBox
from gptoss_convert.errors import InputError, IntegrityError

_MAX_PIECES_PER_BOX = 64


def require_tiling(shape: tuple[int, ...], boxes: Collection[ChunkBox]) -> None:
    """Raise IntegrityError unless the boxes cover every element of `shape` exactly once."""
    if not boxes:
        raise IntegrityError(f"no chunk holds an element of shape {shape}")
    for box in boxes:
        ends = (s + e for s, e in zip(box.start, box.extent, strict=True))
        if 0 in box.extent or any(end > dim for end, dim in zip(ends, shape, strict=True)):
            raise IntegrityError(f"chunk {_span(box)} is empty or outside shape {shape}")
    if not _is_grid(shape, boxes):
        _sweep(shape, list(boxes), 0, [_MAX_PIECES_PER_BOX * len(boxes)])


def _is_grid(shape: tuple[int, ...], boxes: Collection[ChunkBox]) -> bool:
    """Whether equal boxes stand at the points of a grid, each once: what parallel savers write."""
    extent = next(iter(boxes)).extent
    return (
        all(box.extent == extent for box in boxes)
        and all(dim % step == 0 for dim, step in zip(shape, extent, strict=True))
        and all(
            start % step == 0
            for box in boxes
            for start, step in zip(box.start, extent, strict=True)
        )
        and len(boxes) * math.prod(extent) == math.prod(shape)
        and len({box.start for box in boxes}) == len(boxes)
    )


def _sweep(shape: tuple[int, ...], boxes: list[ChunkBox], axis: int, budget: list[int]) -> None:
    """Cut the tensor along one axis where the boxes begin or end, and check each slab's rest."""
    if axis == len(shape):
        if len(boxes) > 1:
            raise IntegrityError(f"chunks {_span(boxes[0])} and {_span(boxes[1])} overlap")
        return
    reached = 0
    for begin, end, members in _slabs(boxes, axis, budget):
        if begin > reached:
            break
        _sweep(shape, members, axis + 1, budget)
        reached = end
    if reached != shape[axis]:
        raise IntegrityError(
            f"no chunk covers index {reached} of axis {axis} (size {shape[axis]}) "
            f"near chunk {_span(boxes[0])}"
        )


def _slabs(
    boxes: Sequence[ChunkBox], axis: int, budget: list[int]
) -> Iterator[tuple[int, int, list[ChunkBox]]]:
    """Yield (begin, end, boxes that span it) between neighbouring cuts that any box spans."""
    cuts = sorted({b.start[axis] for b in boxes} | {b.start[axis] + b.extent[axis] for b in boxes})
    position = {cut: i for i, cut in enumerate(cuts)}
    spanning: list[list[ChunkBox]] = [[] for _ in cuts]
    for box in boxes:
        begin = position[box.start[axis]]
        end = position[box.start[axis] + box.extent[axis]]
        budget[0] -= end - begin
        if budget[0] < 0:
            raise InputError("chunks are too irregular to check for gaps and overlaps")
        for slab in spanning[begin:end]:
            slab.append(box)
    for begin, end, members in zip(cuts, cuts[1:], spanning, strict=False):
        if members:
            yield begin, end, members


def _span(box: ChunkBox) -> str:
    ranges = (f"{s}:{s + e}" for s, e in zip(box.start, box.extent, strict=True))
    return f"[{', '.join(ranges)}]"

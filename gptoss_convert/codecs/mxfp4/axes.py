"""Iteration over strided views: fewer and longer axes, offsets, bounded pieces."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Axis:
    """One loop over several views: how often, and each view's stride in bytes."""

    length: int
    strides: tuple[int, ...]


def merged(shape: Sequence[int], *strides: Sequence[int]) -> list[Axis]:
    """The axes, slowest first, without those of length 1, neighbours that run on made one."""
    axes: list[Axis] = []
    for length, *steps in zip(shape, *strides, strict=True):
        if length == 1:
            continue
        if axes and axes[-1].strides == tuple(step * length for step in steps):
            axes[-1] = Axis(axes[-1].length * length, tuple(steps))
        else:
            axes.append(Axis(length, tuple(steps)))
    return axes


def offsets(axes: Sequence[Axis], operands: int) -> Iterator[tuple[int, ...]]:
    """The offset of each operand, in bytes, for every index of `axes`."""
    for index in itertools.product(*(range(axis.length) for axis in axes)):
        yield tuple(
            sum(i * axis.strides[k] for i, axis in zip(index, axes, strict=True))
            for k in range(operands)
        )


def pieces(shape: Sequence[int], limit: int) -> Iterator[tuple[slice, ...]]:
    """Slices of the leading axes that cut `shape`, in order, into parts of at most `limit`."""
    if math.prod(shape) <= limit:
        yield ()
        return
    inner = math.prod(shape[1:])
    step = max(1, limit // inner)
    for start in range(0, shape[0], step):
        part = slice(start, min(start + step, shape[0]))
        for rest in pieces(shape[1:], limit) if inner > limit else [()]:
            yield (part, *rest)

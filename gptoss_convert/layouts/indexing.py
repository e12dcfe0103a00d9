"""Indexes as numpy has them, into a parameter's axes."""

from __future__ import annotations

from collections.abc import Sequence
from operator import index as as_number
from types import EllipsisType

from gptoss_convert.layouts.layout import Box

Index = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]


def resolved(
    name: str, axes: Sequence[str], shape: Sequence[int], index: Index
) -> tuple[Box, tuple[int | slice, ...]]:
    """The box that an index needs, and the index that picks its elements out of that box.

    Raises IndexError for what is out of range, TypeError for what is no index.
    """
    given = list(index) if isinstance(index, tuple) else [index]
    if given.count(...) > 1 or len(given) - given.count(...) > len(axes):
        raise IndexError(f"{name}: {len(given)} indexes for the axes {', '.join(axes)}")
    place = given.index(...) if ... in given else len(given)
    missing = len(axes) - len(given) + given.count(...)
    given[place : place + 1] = [slice(None)] * missing
    box: list[tuple[int, int]] = []
    picked: list[int | slice] = []
    for axis, length, item in zip(axes, shape, given, strict=True):
        span, pick = _span(f"{name}: {axis}", length, item)
        box.append(span)
        picked.append(pick)
    return tuple(box), tuple(picked)


def _span(where: str, length: int, item: object) -> tuple[tuple[int, int], int | slice]:
    if isinstance(item, slice):
        start, stop, step = item.indices(length)
        if step < 1:
            raise IndexError(f"{where}: slices go forwards, found step {step}")
        return (start, max(start, stop)), slice(None, None, step)
    try:
        number = as_number(item)  # pyright: ignore[reportArgumentType]
    except TypeError:
        raise TypeError(f"{where}: {item!r:.40} is neither a number nor a slice") from None
    if not -length <= number < length:
        raise IndexError(f"{where} {number} does not exist, there are {length}")
    number %= length
    return (number, number + 1), 0

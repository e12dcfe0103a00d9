"""Layouts: strings such as `expert (inter glu) hidden` that say where a tensor's named axes sit.

A layout lists the tensor's dimensions, slowest first; a parenthesis joins several axes into one
dimension. `*` stands for the axes a parameter has left over: several parameters may be concatenated
along it, in the order the rule lists them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from gptoss_convert.errors import InputError

STAR = "*"
_TOKEN = re.compile(r"\s*([()]|\*|[a-z][a-z0-9_]*)")

Range = tuple[int, int]
Box = tuple[Range, ...]
"""A half-open range per axis."""


@dataclass(frozen=True, slots=True)
class Layout:
    """The dimensions of a tensor, each a tuple of axis names, slowest first."""

    text: str
    dims: tuple[tuple[str, ...], ...]

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Parse `text`; raises InputError that shows the text and the place."""
        dims: list[tuple[str, ...]] = []
        group: list[str] | None = None
        position = 0
        while position < len(text.rstrip()):
            match = _TOKEN.match(text, position)
            if match is None:
                raise InputError(f"layout {text!r}: unexpected character at {position + 1}")
            token = match[1]
            position = match.end()
            if token == "(":
                if group is not None:
                    raise InputError(f"layout {text!r}: parentheses do not nest")
                group = []
            elif token == ")":
                if not group:
                    raise InputError(f"layout {text!r}: ')' closes nothing")
                dims.append(tuple(group))
                group = None
            elif group is not None:
                group.append(token)
            else:
                dims.append((token,))
        if group is not None:
            raise InputError(f"layout {text!r}: '(' is never closed")
        axes = [axis for dim in dims for axis in dim]
        for axis in axes:
            if axes.count(axis) > 1:
                raise InputError(f"layout {text!r}: axis {axis!r} appears twice")
        if not dims:
            raise InputError("layout '': a tensor has at least one dimension")
        return cls(text, tuple(dims))

    @property
    def axes(self) -> tuple[str, ...]:
        """All axes, slowest first, `*` included."""
        return tuple(axis for dim in self.dims for axis in dim)


@dataclass(frozen=True, slots=True)
class AxisPlace:
    """Where one axis of a parameter sits: its index i adds i·step to the dimension's index."""

    dim: int
    step: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one parameter sits in a tensor; axes bound by the tensor's name have no place."""

    param: str
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    places: tuple[AxisPlace | None, ...]
    star: tuple[int, int, int, int]
    """(dimension, step, first index, length) of the parameter's share of `*`; zeros without one."""
    star_axes: tuple[str, ...]
    """The parameter's axes that `*` stands for."""


def shape_of(
    layout: Layout,
    params: Mapping[str, Sequence[str]],
    sizes: Mapping[str, int],
    named: Sequence[str] = (),
) -> tuple[tuple[int, ...], tuple[Placement, ...]]:
    """The shape of a tensor with this layout, and where each parameter sits in it.

    `params` maps each parameter's name to its axes, slowest first; `named` are the axes that the
    tensor's name binds to one index. Parameters are concatenated along `*` in the given order.
    """
    known = {*layout.axes, *named}
    left = {name: [axis for axis in axes if axis not in known] for name, axes in params.items()}
    share = {name: math.prod(sizes[axis] for axis in rest) for name, rest in left.items()}
    length = {axis: sum(share.values()) if axis == STAR else sizes[axis] for axis in layout.axes}
    shape: list[int] = []
    place: dict[str, AxisPlace] = {}
    for dim, axes in enumerate(layout.dims):
        step = 1
        for axis in reversed(axes):
            place[axis] = AxisPlace(dim, step)
            step *= length[axis]
        shape.append(step)
    placements: list[Placement] = []
    first = 0
    for name, axes in params.items():
        placements.append(_placement(name, axes, left[name], place, first, sizes))
        first += share[name]
    return tuple(shape), tuple(placements)


def _placement(
    param: str,
    axes: Sequence[str],
    left: Sequence[str],
    place: Mapping[str, AxisPlace],
    first: int,
    sizes: Mapping[str, int],
) -> Placement:
    """Where one parameter sits, its axes `left` over taking `*` from index `first` on."""
    own = {axis: place[axis] for axis in axes if axis in place}
    lengths = tuple(sizes[axis] for axis in axes)
    if STAR not in place:
        places = tuple(own.get(axis) for axis in axes)
        return Placement(param, tuple(axes), lengths, places, (0, 0, 0, 0), ())
    dim, step = place[STAR].dim, place[STAR].step
    star = (dim, step, first, math.prod(sizes[axis] for axis in left))
    for axis in reversed(left):
        own[axis] = AxisPlace(dim, step)
        step *= sizes[axis]
    places = tuple(own.get(axis) for axis in axes)
    return Placement(param, tuple(axes), lengths, places, star, tuple(left))


def interval_boxes(start: int, stop: int, sizes: Sequence[int]) -> Iterator[Box]:
    """Cut the flat interval [start, stop) of a row-major array into boxes, in order."""
    if len(sizes) <= 1:
        yield ((start, stop),) if sizes else ()
        return
    inner = math.prod(sizes[1:])
    full = tuple((0, size) for size in sizes[1:])
    first, skipped = divmod(start, inner)
    last, partial = divmod(stop, inner)
    if first == last:
        for box in interval_boxes(skipped, partial, sizes[1:]):
            yield ((first, first + 1), *box)
        return
    if skipped:
        for box in interval_boxes(skipped, inner, sizes[1:]):
            yield ((first, first + 1), *box)
        first += 1
    if first < last:
        yield ((first, last), *full)
    if partial:
        for box in interval_boxes(0, partial, sizes[1:]):
            yield ((last, last + 1), *box)

"""Updates: what an adapter adds to boxes of parameters, as low-rank halves in its files."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from gptoss_convert.layouts.extents import Extent
from gptoss_convert.layouts.layout import Box

if TYPE_CHECKING:
    from fractions import Fraction

RANK = "rank"
"""The axis along which the two halves of an update are multiplied and summed."""
MAX_BYTES = 32 << 20
"""An update is cut into parts whose factors take no more, as float32."""
AT_ONCE = 3
"""Files that merged weights are written to at the same time, however many workers there are."""
_SMALL = 64 << 20
"""Bytes of updates that are kept all."""
Kind = Literal["module", "parameter", "embedding"]
"""What PEFT attaches an update to; its own merge rounds each kind in its own way."""


@dataclass(frozen=True, slots=True)
class Factor:
    """One stored half of an update, or another tensor beside it."""

    axes: tuple[str, ...]
    """Axes of the parameter, and `rank`; slowest first, not as they are stored."""
    lengths: tuple[int, ...]
    extents: tuple[Extent, ...]
    """Where it lies in the adapter's files, in these axes."""
    tensor: str

    @property
    def start(self) -> tuple[int, ...]:
        """The first index on each axis."""
        return tuple(
            min(lo for lo, _ in spans) for spans in zip(*(e.box for e in self.extents), strict=True)
        )

    @property
    def nbytes(self) -> int:
        """Bytes of it as float32."""
        return 4 * math.prod(self.lengths)


@dataclass(frozen=True, slots=True)
class Update:
    """A box of a parameter gets `scale · Σ over rank of b · a` added, then perhaps a new length.

    An axis that neither half has is shared: all its indexes get the same. Without `a`, b itself is
    added.
    """

    param: str
    axes: tuple[str, ...]
    """Of the parameter, slowest first."""
    box: Box
    kind: Kind
    rank: int
    scale: Fraction
    """Exactly, wherever the adapter states it as a quotient."""
    b: Factor
    a: Factor | None = None
    magnitude: Factor | None = None
    """DoRA: the sum is scaled so that its norm along the axes that this has not is this."""

    @property
    def factors(self) -> tuple[Factor, ...]:
        """All that is stored of it."""
        return tuple(one for one in (self.a, self.b, self.magnitude) if one is not None)

    @property
    def whole_axes(self) -> frozenset[str]:
        """The axes along which it takes norms: no part of them alone can be merged."""
        return frozenset(self.axes) - {*self.magnitude.axes} if self.magnitude else frozenset()

    @property
    def nbytes(self) -> int:
        """Bytes of all its factors as float32."""
        return sum(one.nbytes for one in self.factors)

    @property
    def matrix_bytes(self) -> int:
        """The same of those parts that are multiplied at once: one index of axes that both have."""
        if self.a is None or self.magnitude is not None:
            return self.nbytes
        lengths = dict(zip(self.b.axes, self.b.lengths, strict=True))
        both = {*self.a.axes} & {*self.b.axes} - {RANK}
        return self.nbytes // math.prod(lengths[axis] for axis in both)


def cut(updates: Iterable[Update], most: int = MAX_BYTES) -> Iterator[Update]:
    """The same updates in parts that are no larger, as far as their halves can be cut."""
    for update in updates:
        axis = _cut_axis(update) if update.nbytes > most and update.magnitude is None else None
        if axis is None:
            yield update
            continue
        lo, hi = update.box[axis]
        middle = (lo + hi) // 2
        for span in ((lo, middle), (middle, hi)):
            box = (*update.box[:axis], span, *update.box[axis + 1 :])
            yield from cut([_part(update, axis, box)], most)


def _cut_axis(update: Update) -> int | None:
    """The first axis of the parameter that the larger half has and that can be halved."""
    largest = max(update.factors, key=lambda one: one.nbytes)
    lengths = dict(zip(largest.axes, largest.lengths, strict=True))
    for place, axis in enumerate(update.axes):
        if lengths.get(axis, 1) > 1:
            return place
    return None


def _part(update: Update, axis: int, box: Box) -> Update:
    span = box[axis]
    name = update.axes[axis]
    b, a = (
        one if one is None or name not in one.axes else _narrowed(one, name, span)
        for one in (update.b, update.a)
    )
    assert b is not None
    return replace(update, box=box, b=b, a=a)


def _narrowed(factor: Factor, axis: str, span: tuple[int, int]) -> Factor:
    """A factor's part in a range of one of its axes."""
    place = factor.axes.index(axis)
    found: list[Extent] = []
    for extent in factor.extents:
        lo, hi = extent.box[place]
        if (first := max(lo, span[0])) < (last := min(hi, span[1])):
            box = (*extent.box[:place], (first, last), *extent.box[place + 1 :])
            found.append(replace(extent, box=box))
    lengths = (*factor.lengths[:place], span[1] - span[0], *factor.lengths[place + 1 :])
    return replace(factor, lengths=lengths, extents=tuple(found))


def kept_bytes(updates: Sequence[Update]) -> tuple[int, bool]:
    """Bytes of factors that are kept in memory, and whether they are all there are.

    Of many, two of the largest for each file that is written: one follows another while workers
    are still at the first.
    """
    every = sum(one.nbytes for one in {factor for update in updates for factor in update.factors})
    if every <= _SMALL:
        return every, True
    return 2 * AT_ONCE * max(one.nbytes for one in updates), False

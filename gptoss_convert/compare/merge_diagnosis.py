"""Wrong merges of an adapter, told by what was added to the base instead of its update."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from gptoss_convert.compare.diagnosis import Bits
from gptoss_convert.engine.steps import Step

Readings = Mapping[str, Callable[[], Bits]]
"""By name, what a weight would be if the adapter were read otherwise."""
UNMERGED = "not merged"
_ALIKE = 0.9
"""From this cosine on, what was added is taken for a known update: both sides are rounded."""
_AT_ONCE = 1 << 18


def looks_merged(step: Step, ours: Bits, theirs: Bits, readings: Readings) -> str | None:
    """How `theirs` was merged, if one of the other readings, or a known mistake, explains it.

    One of the `readings` is the base itself, as `UNMERGED`.
    """
    for name, reading in readings.items():
        if np.array_equal(reading(), theirs):
            return name
    if UNMERGED not in readings:
        return None
    base = readings[UNMERGED]()
    found = (
        (_likeness(base, theirs, *(change(one) for one in (base, ours))), name)
        for name, change in _changes(step, ours)
    )
    (cosine, factor), name = max(found, key=lambda one: one[0][0])
    if cosine < _ALIKE:
        return None
    times = "" if abs(factor - 1) < 0.1 else f"{factor:.3g} times as strong"
    if name:
        return f"merged with its update {name}{times and f' and {times}'}"
    return f"merged {times}" if times else "merged, but rounded otherwise"


def _changes(step: Step, ours: Bits) -> Iterator[tuple[str, Callable[[Bits], Bits]]]:
    """What may have been done to an update, by name; nothing first."""
    yield "", lambda bits: bits
    axes = step.family.axes
    last = len(axes) - 1
    for axis in range(last):
        if ours.shape[axis] > 1 and ours.shape[axis] == ours.shape[last]:
            yield "transposed", lambda bits, axis=axis: bits.swapaxes(axis, last)
    if "glu" in axes and ours.shape[axes.index("glu")] == 2:
        glu, inter = axes.index("glu"), axes.index("inter")
        yield "exchanged between gate and up", lambda bits: np.flip(bits, glu)
        yield "in halves for interleaved", lambda bits: _halves(bits, inter, glu)
    if "expert" in axes and ours.shape[axes.index("expert")] > 1:
        expert = axes.index("expert")
        for by in (1, -1):
            yield "shifted by one expert", lambda bits, by=by: np.roll(bits, by, expert)


def _halves(bits: Bits, inter: int, glu: int) -> Bits:
    """Rows that alternate between gate and up, filled with all of gate and then all of up."""
    return bits.swapaxes(inter, glu).reshape(bits.shape)


def _likeness(base: Bits, theirs: Bits, before: Bits, after: Bits) -> tuple[float, float]:
    """(cosine of what was added to the base and of an update, how many times it is as large)."""
    sides = [one.reshape(-1) for one in (base, theirs, before, after)]
    products = np.zeros(3)
    for start in range(0, base.size, _AT_ONCE):
        a, b, c, d = (_values(one[start : start + _AT_ONCE]) for one in sides)
        added, update = b - a, d - c
        products += (added @ update, added @ added, update @ update)
    both, mine, other = map(float, products)
    length = math.sqrt(mine * other)
    return (both / length, both / other) if length else (0.0, 0.0)


def _values(bits: Bits) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

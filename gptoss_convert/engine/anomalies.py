"""Values that no GPT-OSS model has: infinities, NaN, and matrices that are zero throughout.

Infinities and NaN come from float sources only, as MXFP4 decodes to finite values or is refused.
A matrix of zeros is what a hole in a file, a lost write or a skipped tensor looks like.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptoss_convert.codecs.mxfp4.axes import pieces
from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.engine.buffers import Array, Part
from gptoss_convert.engine.fingerprint import EXPONENT
from gptoss_convert.engine.records import Anomalies
from gptoss_convert.engine.steps import Plan, Step
from gptoss_convert.engine.work import Work

_PIECE, _FIRST = 1 << 18, 1 << 14
"""Elements that are looked at at once."""
Matrix = tuple[str, int, int]
"""Weight, layer and expert (0 where there are none) of one matrix or vector."""


def examine(work: Work, finite: bool) -> Anomalies:
    """What is odd in the values that a step holds, as BF16 bits or encoded.

    `finite` says that they are known to hold no infinity or NaN, so none is looked for.
    """
    family, recipe = work.step.family, work.step.recipe
    axis = family.axes.index("expert") if "expert" in family.axes else -1
    experts = range(*work.step.box[axis]) if axis >= 0 else range(1)
    parts: Sequence[Part] = ()
    mask, nonfinite, first = 0x7FFF, 0, ""
    if recipe.has_values:
        parts = work.held[family.weight]
        for part in () if finite else parts:
            count, where = _nonfinite(work.step, part)
            nonfinite, first = nonfinite + count, first or where
    elif recipe.measured is not None:
        member, mask = recipe.measured.codec.magnitudes
        parts = work.held[recipe.measured.param(member)]
    zeros = (expert for expert in experts if _all_zero(parts, axis, expert, mask))
    return Anomalies(nonfinite, first, tuple(zeros))


def made_odd(piece: Work) -> Anomalies:
    """The infinities and NaN in what was made of a weight, where the source may have had none."""
    found = [_nonfinite(piece.step, part) for part in piece.held[piece.step.family.weight]]
    first = next((where for count, where in found if count), "")
    return Anomalies(
        sum(count for count, _ in found), f"{first}, as the changes on the way made it"
    )


def _all_zero(parts: Sequence[Part], axis: int, expert: int, mask: int) -> bool:
    views = [part.array for part in parts]
    if axis >= 0:
        before = (slice(None),) * axis
        lows = [part.box[axis][0] for part in parts]
        views = [
            view[(*before, expert - low)]
            for view, low in zip(views, lows, strict=True)
            if low <= expert < low + view.shape[axis]
        ]
    return bool(views) and not any(_any(view, mask) for view in views)


def _any(array: Array, mask: int) -> bool:
    """Whether a masked bit is set anywhere; the first values nearly always tell."""
    if np.any(array[(0,) * (array.ndim - 1)][:_FIRST] & mask):
        return True
    return any(np.any(piece & mask) for _, piece in _pieces(array))


def _nonfinite(step: Step, part: Part) -> tuple[int, str]:
    """How many infinities and NaN a part holds, and the first of them in words."""
    count, inside = 0, ()
    for start, piece in _pieces(part.array):
        odd = (piece & EXPONENT) == EXPONENT
        if found := int(np.count_nonzero(odd)):
            if not count:
                first = np.unravel_index(int(odd.argmax()), odd.shape)
                inside = tuple(int(i) + at for i, at in zip(first, start, strict=True))
            count += found
    if not count:
        return 0, ""
    bits = int(part.array[inside])
    value = "NaN" if bits & 0x7F else "-inf" if bits >> 15 else "inf"
    index = [i + lo for i, (lo, _) in zip(inside, part.box, strict=True)]
    extent = part.extent
    byte = extent.origin + sum(i * s for i, s in zip(index, extent.strides, strict=True))
    axes = " ".join(step.family.axes)
    return count, (
        f"{extent.tensor}: {value} at {index} ({axes}), {DTYPE_BYTES[extent.dtype]} bytes at "
        f"{byte} of {extent.file.name}"
    )


def _pieces(array: Array) -> Iterator[tuple[tuple[int, ...], Array]]:
    """(where it begins, a view) of pieces in order, so small that what is computed of them takes no
    memory that counts."""
    for piece in pieces(array.shape, _PIECE):
        lows = [part.start for part in piece]
        yield (*lows, *(0 for _ in array.shape[len(lows) :])), array[piece]


def zero_matrices(plan: Plan, found: Mapping[int, Anomalies]) -> list[Matrix]:
    """The matrices and vectors that are zero throughout, from those of all steps."""
    suspects = {
        (plan.steps[number].family.weight, plan.steps[number].layer, expert)
        for number, odd in found.items()
        for expert in odd.zeros
    }
    if suspects:
        for number, step in enumerate(plan.steps):
            weight, layer = step.family.weight, step.layer
            zeros = found[number].zeros if number in found else ()
            suspects -= {(weight, layer, expert) for expert in {*_experts(step)} - {*zeros}}
    return sorted(suspects)


def _experts(step: Step) -> range:
    axes = step.family.axes
    return range(*step.box[axes.index("expert")]) if "expert" in axes else range(1)


def is_vector(weight: str) -> bool:
    """Whether zeros throughout are no sign of damage: biases and sinks."""
    return not weight.endswith(".weight")


def tensors_of(plan: Plan, matrices: Iterable[Matrix]) -> list[str]:
    """The source's tensors that hold these matrices, for messages."""
    wanted = {(weight, layer) for weight, layer, _ in matrices}
    steps = (s for s in plan.steps if (s.family.weight, s.layer) in wanted)
    return sorted({extent.tensor for step in steps for extent in step.sources})


def summary(plan: Plan, found: Mapping[int, Anomalies]) -> dict[str, Any]:
    """Counts by weight: infinities and NaN, and matrices or vectors of zeros; empty if none."""
    counts: dict[str, dict[str, int]] = defaultdict(lambda: {"nonfinite": 0, "zero": 0})
    for number, odd in found.items():
        if odd.nonfinite:
            counts[plan.steps[number].family.weight]["nonfinite"] += odd.nonfinite
    for weight, _, _ in zero_matrices(plan, found):
        counts[weight]["zero"] += 1
    return dict(counts)

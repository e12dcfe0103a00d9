"""Known mistakes that explain a difference: transposed, exchanged, shifted, flipped, lost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
import numpy.typing as npt

from gptoss_convert.compare.arrays import equal, everywhere
from gptoss_convert.engine.steps import Step

Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class ExpertDigests:
    """What one expert (0 where there is none) of a tile that differs holds on either side."""

    layer: int
    expert: int
    rest: tuple[tuple[int, int], ...]
    """The tile's box on the axes that are neither layer nor expert."""
    source: bytes
    target: bytes


def expert_digests(step: Step, ours: Bits, theirs: Bits) -> tuple[ExpertDigests, ...]:
    """The tile expert by expert, as digests."""
    axes = step.family.axes
    axis = axes.index("expert") if "expert" in axes else -1
    rest = tuple(
        span for name, span in zip(axes, step.box, strict=True) if name not in {"layer", "expert"}
    )
    if axis < 0:
        return (ExpertDigests(step.layer, 0, rest, _digest(ours), _digest(theirs)),)
    first = step.box[axis][0]
    pairs = zip(np.moveaxis(ours, axis, 0), np.moveaxis(theirs, axis, 0), strict=True)
    return tuple(
        ExpertDigests(step.layer, first + index, rest, _digest(a), _digest(b))
        for index, (a, b) in enumerate(pairs)
    )


def _digest(bits: Bits) -> bytes:
    return blake2b(np.ascontiguousarray(bits).data, digest_size=16).digest()


Homes = Mapping[tuple[tuple[tuple[int, int], ...], bytes], ExpertDigests]
"""By place and content: where SOURCE holds it."""


def homes(found: Iterable[ExpertDigests]) -> Homes:
    """Where SOURCE holds each expert's part of a tile."""
    return {(one.rest, one.source): one for one in found}


def misplaced(found: Iterable[ExpertDigests], known: Homes) -> str | None:
    """`exchanged: expert 3 holds expert 5 of SOURCE`, if the first that differs has such a home."""
    for one in found:
        home = known.get((one.rest, one.target))
        if home is None or home is one or one.source == one.target:
            continue
        if home.layer != one.layer:
            return f"exchanged: it holds layer {home.layer} of SOURCE"
        return f"exchanged: expert {one.expert} holds expert {home.expert} of SOURCE"
    return None


def looks(step: Step, ours: Bits, theirs: Bits) -> str | None:
    """The known mistake that turns one tile into the other, if one does."""
    axes = step.family.axes
    last = len(axes) - 1
    wide = [axis for axis in range(last) if ours.shape[axis] > 1]
    swaps = [axis for axis in wide if ours.shape[axis] == ours.shape[last]]
    if any(equal(ours.swapaxes(axis, last), theirs) for axis in swaps):
        return "transposed"
    for axis in wide:
        if equal(np.flip(ours, axis), theirs):
            return "gate and up exchanged" if axes[axis] == "glu" else f"{axes[axis]} reversed"
        if _shifted(ours, theirs, axis) or _shifted(theirs, ours, axis):
            return f"{axes[axis]} shifted by one"
    if everywhere(lambda a, b: a ^ np.uint16(0x8000) == b, ours, theirs):
        return "signs flipped"
    if everywhere(lambda a, b: (a == b) | ((a | b) & np.uint16(0x7FFF) == 0), ours, theirs):
        return "zeros with the other sign"
    return None if theirs.any() else "all zero in TARGET"


def _shifted(ours: Bits, theirs: Bits, axis: int) -> bool:
    """Whether the elements lie one place further on in the second array, around its end."""
    a, b = np.moveaxis(ours, axis, 0), np.moveaxis(theirs, axis, 0)
    return equal(a[-1], b[0]) and equal(a[:-1], b[1:])

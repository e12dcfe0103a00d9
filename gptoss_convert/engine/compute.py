"""One step's arithmetic in memory: copy, decode, encode, between strided views."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gptoss_convert.codecs import mxfp4
from gptoss_convert.engine.fingerprint import (
    MASK,
    ScaleStatistics,
    examined,
    packed_fingerprint,
    scale_statistics,
)
from gptoss_convert.engine.parts import Array, Part, Parts, joined
from gptoss_convert.engine.steps import Step, member_box
from gptoss_convert.errors import CodecError, IntegrityError
from gptoss_convert.layouts.extents import overlap
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import BLOCK


def compute(step: Step, held: Parts, taken: Parts) -> mxfp4.EncodeStats:
    """Fill the parts that the target takes; returns what an encoding did to the values."""
    family = step.family
    blocks, scales = family.blocks or "", family.scales or ""
    stats = mxfp4.EncodeStats()
    held = {member: joined(parts) for member, parts in held.items()}
    taken = {member: joined(parts) for member, parts in taken.items()}
    if blocks in taken and blocks not in held:
        stats = _encode(step, held, taken)
    for member, parts in taken.items():
        if member in held and not (member == scales and blocks not in held and blocks in taken):
            for part in parts:
                _copy(held[member], part)
        elif member == family.weight:
            for part in parts:
                _decode(step, held, part)
    return stats


def _copy(sources: Sequence[Part], target: Part) -> None:
    for source in sources:
        if common := overlap(source.box, target.box):
            mxfp4.copy(source.view(common), target.view(common))


def gather(parts: Sequence[Part], box: Box) -> Array:
    """The elements of `box` as one view: of the part that holds it all, else of a copy."""
    for part in parts:
        if overlap(part.box, box) == box:
            return part.view(box)
    shape = tuple(hi - lo for lo, hi in box)
    whole = Part(parts[0].extent, box, -1, np.empty(shape, parts[0].array.dtype))
    _copy(parts, whole)
    return whole.array


def _decode(step: Step, held: Parts, target: Part) -> None:
    family = step.family
    lo, hi = target.box[-1]
    blocks_box = member_box(family, family.blocks or "", target.box)
    scales_box = member_box(family, family.scales or "", target.box)
    blocks = gather(held[family.blocks or ""], blocks_box)
    scales = gather(held[family.scales or ""], scales_box)
    first = scales_box[-1][0] * BLOCK
    whole = lo == first and hi == scales_box[-1][1] * BLOCK
    values = target.array
    if not whole:
        values = np.empty((*target.array.shape[:-1], scales.shape[-1] * BLOCK), np.uint16)
    try:
        mxfp4.decode(blocks, scales, values)
    except CodecError as error:
        tensor = held[family.scales or ""][0].extent.tensor
        raise IntegrityError(f"{tensor}: box {_show(scales_box)}: {error}") from None
    if not whole:
        mxfp4.copy(values[..., lo - first : hi - first], target.array)


def _encode(step: Step, held: Parts, taken: Parts) -> mxfp4.EncodeStats:
    family = step.family
    assert family.blocks is not None
    assert family.scales is not None
    values = gather(held[family.weight], step.box)
    blocks = _room(taken[family.blocks], member_box(family, family.blocks, step.box))
    scales = _room(taken[family.scales], member_box(family, family.scales, step.box))
    hints = None
    if family.scales in held:
        hints = gather(held[family.scales], scales.box)
    stats = mxfp4.encode(values, blocks.array, scales.array, hints)
    for member, made in ((family.blocks, blocks), (family.scales, scales)):
        for part in taken[member]:
            if made is not part:
                _copy([made], part)
    if stats.nonfinite:
        raise IntegrityError(
            f"{held[family.weight][0].extent.tensor}: box {_show(step.box)}: "
            f"{stats.nonfinite} values are infinite or NaN"
        )
    return stats


def _room(parts: Sequence[Part], box: Box) -> Part:
    """A place for the elements of `box`: the part that is this box, else one to be copied from."""
    if len(parts) == 1 and parts[0].box == box:
        return parts[0]
    shape = tuple(hi - lo for lo, hi in box)
    return Part(parts[0].extent, box, -1, np.empty(shape, parts[0].array.dtype))


def _show(box: Box) -> str:
    return "[" + ", ".join(str(lo) if hi == lo + 1 else f"{lo}:{hi}" for lo, hi in box) + "]"


def statistics(step: Step, held: Parts, taken: Parts) -> ScaleStatistics:
    """What the step's MXFP4 scales look like, wherever its blocks are in memory."""
    blocks, scales = step.family.blocks, step.family.scales
    for parts in (held, taken):
        if blocks and scales and blocks in parts and scales in parts:
            return scale_statistics(
                gather(parts[blocks], member_box(step.family, blocks, step.box)),
                gather(parts[scales], member_box(step.family, scales, step.box)),
            )
    return ScaleStatistics()


@dataclass(frozen=True, slots=True)
class Share:
    """What the values of a step, or of a piece of it, are."""

    fingerprint: int | None
    """Their share in the fingerprint of their weight and layer, None if there are scales only."""
    finite: bool
    """Whether none of them is an infinity or NaN."""


def share(step: Step, held: Parts, taken: Parts, encoded: mxfp4.EncodeStats) -> Share:
    """Sum up the target's values; raises IntegrityError for blocks that are not finite."""
    family = step.family
    if family.weight in taken:
        return _share_of(step, taken[family.weight])
    if family.weight in held and not encoded.inexact_blocks:
        return _share_of(step, held[family.weight])
    if family.blocks and family.scales and family.blocks in taken and family.scales in taken:
        blocks = gather(taken[family.blocks], member_box(family, family.blocks, step.box))
        scales = gather(taken[family.scales], member_box(family, family.scales, step.box))
        try:
            total = packed_fingerprint(blocks, scales, step.box, step.lengths, step.layer_axis)
        except CodecError as error:
            tensor = taken[family.scales][0].extent.tensor
            raise IntegrityError(f"{tensor}: box {_show(step.box)}: {error}") from None
        return Share(total, True)
    return Share(None, True)


def _share_of(step: Step, weights: Sequence[Part]) -> Share:
    total, odd, counted = 0, False, False
    for part in weights:
        one, found = examined(part.array, part.box, step.lengths, step.layer_axis)
        odd |= found
        if not part.extent.alias:
            total, counted = total + one & MASK, True
    return Share(total if counted else None, not odd)

"""Blocks of MXFP4 in strided views: those that are not exact are found and rounded by a rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.codecs.mxfp4.axes import pieces
from gptoss_convert.codecs.mxfp4.reference import MAX_SCALE, NO_HINT, U8, U16, decode_blocks
from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.quantise.rules import BIAS, GRID, Rule, nearest_codes, round_blocks

__all__ = ["pieces", "round_inexact"]

_LARGEST = 6.0
"""The largest magnitude of a code."""


def round_inexact(
    values: U16,
    parts: Mapping[str, NDArray[Any]],
    hints: U8 | None,
    piece: tuple[slice, ...],
    rule: Rule,
) -> EncodeStats:
    """Round the blocks of a piece anew that do not decode to their values; returns what that did.

    `values` (..., B * 32) are finite BF16 bits; `parts` are blocks (..., B, 16), scales (..., B).
    """
    scales = parts["scales"]
    *steps, step = values.strides
    grouped = np.lib.stride_tricks.as_strided(
        values, (*scales.shape, 32), (*steps, 32 * step, step)
    )
    wanted = np.ascontiguousarray(grouped[piece]).reshape(-1, 32)
    made = np.ascontiguousarray(parts["blocks"][piece]).reshape(-1, 16)
    chosen = np.ascontiguousarray(scales[piece]).reshape(-1)
    before = np.full(chosen.shape, NO_HINT, np.uint8) if hints is None else hints.reshape(-1)
    odd = np.flatnonzero((decode_blocks(made, chosen) != wanted).any(axis=1))
    if odd.size:
        codes, chosen[odd] = round_blocks(wanted[odd], before[odd], rule)
        made[odd] = codes[:, 0::2] | (codes[:, 1::2] << 4)
        parts["blocks"][piece] = made.reshape(parts["blocks"][piece].shape)
        scales[piece] = chosen.reshape(scales[piece].shape)
    return _stats(wanted, made, chosen, odd) + _update(
        wanted[odd], made[odd], chosen[odd], before[odd]
    )


def _stats(wanted: U16, made: U8, scales: U8, odd: NDArray[np.intp]) -> EncodeStats:
    """Counts and errors of the blocks at `odd`; of all blocks which scales they have."""
    zero = ~(wanted & 0x7FFF).any(axis=1)
    used = scales[~zero]
    ours = _floats(wanted[odd])
    theirs = _floats(decode_blocks(made[odd], scales[odd]))
    error = np.abs(ours - theirs)
    bound = np.ldexp(_LARGEST, scales[odd].astype(np.int32) - 127)[:, None]
    inexact = error.any(axis=1)
    return EncodeStats(
        inexact_blocks=int(np.count_nonzero(inexact)),
        inexact_values=int(np.count_nonzero(error)),
        clipped=int(np.count_nonzero(np.abs(ours) > bound)),
        flushed=int(np.count_nonzero((theirs == 0) & (ours != 0))),
        zero_blocks=int(np.count_nonzero(zero)),
        min_scale=int(used.min(initial=255)),
        max_scale=int(used.max(initial=0)),
        squares=float(np.square(ours[inexact]).sum()),
        squared_error=float(np.square(error).sum()),
        max_abs_error=float(error.max(initial=0.0)),
    )


def _update(wanted: U16, made: U8, scales: U8, before: U8) -> EncodeStats:
    """What is left of what training changed, against the nearest codes at the former scales."""
    known = before <= MAX_SCALE
    ours, theirs = _floats(wanted[known]), _floats(decode_blocks(made[known], scales[known]))
    codes = nearest_codes(wanted[known], before[known])
    near = np.ldexp(
        GRID[codes & 7].astype(np.float64), before[known].astype(np.int32)[:, None] - BIAS
    )
    near = np.copysign(near, ours)
    update, kept = ours - near, theirs - near
    return EncodeStats(
        update=float(np.square(update).sum()),
        update_kept=float((update * kept).sum()),
        flipped=int(np.count_nonzero(kept)),
        compared=int(near.size),
    )


def _floats(bits: U16) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)

"""Fingerprints: 64 bits a parameter and layer, equal in every format, summed in any order.

The fingerprint of a parameter is the sum over its elements of bits·Πw, modulo 2^64: the element's
BF16 bits times an odd pseudo-random 64-bit weight for its index on each axis but the layer. Being a
sum, it takes tiles in any order and layout. A change of one element always shows; exchanged rows,
transposes and shifts go unseen with a chance of about 2^-48. It is no defence against forgery:
docs/decisions/0006-fingerprints.md.
"""

from __future__ import annotations

import ctypes
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs.codec import Codec
from gptoss_convert.codecs.mxfp4 import library
from gptoss_convert.codecs.mxfp4.library import address
from gptoss_convert.engine.steps import Plan
from gptoss_convert.layouts.layout import Box

Array = npt.NDArray[Any]
Arrays = Mapping[str, Array]
U64 = npt.NDArray[np.uint64]
MASK = (1 << 64) - 1
"""Fingerprints are sums modulo 2^64."""
EXPONENT = 0x7F80
"""Exponent bits of BF16: all set in infinities and NaN."""
_SCRATCH_BYTES = 1 << 19
"""Decoded values that are summed while they are in the cache."""
_LONG, _SPAN = 1 << 19, 1 << 16
"""An axis with more indexes is cut into spans; whole blocks of every encoding fit into one."""
_SHORT = 64
"""A fastest axis shorter than this is joined with the next one, for long inner loops."""


@cache
def axis_weights(axis: int, length: int) -> U64:
    """The odd weights of the first `length` indexes of a parameter's axis (splitmix64)."""
    return _axis_weights(axis, 0, length)


def _weights(axis: int, length: int, lo: int, hi: int) -> U64:
    """The weights of some indexes; of a long axis no more than these are ever in memory."""
    return axis_weights(axis, length)[lo:hi] if length <= _LONG else _axis_weights(axis, lo, hi)


def _axis_weights(axis: int, lo: int, hi: int) -> U64:
    # splitmix64 (Steele, Lea, Flood 2014) makes unrelated words of consecutive seeds; 2^40 apart,
    # axes share none. An odd weight has an inverse modulo 2^64, so a change of an element shows.
    with np.errstate(over="ignore"):
        x = np.arange(lo + 1, hi + 1, dtype=np.uint64) + np.uint64((axis + 1) << 40)
        x *= np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (x ^ (x >> np.uint64(31))) | np.uint64(1)


def fingerprint(bits: npt.NDArray[np.uint16], box: Box, lengths: Sequence[int], layer: int) -> int:
    """The part of a parameter's fingerprint that the elements of `box` make; see `examined`."""
    return examined(bits, box, lengths, layer)[0]


def examined(
    bits: npt.NDArray[np.uint16], box: Box, lengths: Sequence[int], layer: int
) -> tuple[int, bool]:
    """(the part of a parameter's fingerprint that the elements of `box` make, whether any of them
    is an infinity or NaN).

    `bits` is a view of any strides, one axis per axis of the parameter; `layer` is the axis that
    does not count, -1 for none.
    """
    if (cut := _cut(box)) is not None:
        found = [
            examined(_part(bits, box, piece), piece, lengths, layer) for piece in _along(box, cut)
        ]
        return sum(total for total, _ in found) & MASK, any(odd for _, odd in found)
    axes = [
        (bits.strides[axis], _weights(axis, lengths[axis], lo, hi))
        for axis, (lo, hi) in enumerate(box)
        if axis != layer
    ]
    scale = reduce(lambda a, b: a * b & MASK, (int(w[0]) for _, w in axes if len(w) == 1), 1)
    longer = sorted(((s, w) for s, w in axes if len(w) > 1), key=lambda axis: axis[0])
    step, columns = longer.pop(0) if longer else (2, np.ones(1, np.uint64))
    while (
        longer
        and len(columns) < _SHORT
        and longer[0][0] == step * len(columns)
        and len(longer[0][1]) * len(columns) <= _LONG
    ):
        columns = np.multiply.outer(longer.pop(0)[1], columns).ravel()
    offsets, rows = np.zeros(1, np.int64), np.ones(1, np.uint64)
    for stride, weights in reversed(longer):
        offsets = np.add.outer(offsets, stride * np.arange(len(weights))).ravel()
        rows = np.multiply.outer(rows, weights).ravel()
    total, odd = _weighted_sum(bits, offsets, rows, step, columns)
    return total * scale & MASK, odd


def packed_fingerprint(
    codec: Codec, parts: Arrays, box: Box, lengths: Sequence[int], layer: int
) -> int:
    """The same of an encoded weight, from all members of the encoding that hold `box`.

    Raises CodecError for the first block that has no finite BF16 value.
    """
    if (cut := _cut(box)) is not None:
        some = ((piece, _members(codec, parts, box, piece)) for piece in _along(box, cut))
        sums = (packed_fingerprint(codec, held, piece, lengths, layer) for piece, held in some)
        return sum(sums) & MASK
    weights = [
        np.ones(hi - lo, np.uint64) if axis == layer else _weights(axis, length, lo, hi)
        for axis, ((lo, hi), length) in enumerate(zip(box, lengths, strict=True))
    ]
    total = codec.weighted_sum(parts, weights)
    if total is not None:
        return total & MASK
    total = 0
    for piece in _pieces(box):
        values = np.empty(tuple(hi - lo for lo, hi in piece), np.uint16)
        codec.decode(_members(codec, parts, box, piece), values)
        total += fingerprint(values, piece, lengths, layer)
    return total & MASK


def _cut(box: Box) -> int | None:
    """The axis along which a box is so long that its weights would take more than it does."""
    spans = [hi - lo for lo, hi in box]
    return spans.index(max(spans)) if spans and max(spans) > _LONG else None


def _along(box: Box, axis: int) -> Iterator[Box]:
    lo, hi = box[axis]
    for start in range(lo, hi, _SPAN):
        yield (*box[:axis], (start, min(start + _SPAN, hi)), *box[axis + 1 :])


def _part(array: Array, box: Box, piece: Box) -> Array:
    """What an array that holds `box` holds of a piece of it."""
    spans = zip(piece, box, strict=True)
    return array[tuple(slice(lo - first, hi - first) for (lo, hi), (first, _) in spans)]


def _members(codec: Codec, parts: Arrays, box: Box, piece: Box) -> dict[str, Array]:
    return {member: _inside(codec, member, held, box, piece) for member, held in parts.items()}


def _inside(codec: Codec, member: str, array: Array, box: Box, piece: Box) -> Array:
    """What a member that holds `box` holds of a piece of it."""
    return _part(array, codec.member_box(member, box), codec.member_box(member, piece))


def _pieces(box: Box) -> Iterator[Box]:
    """A box cut along its rows into pieces that a processor's cache holds."""
    shape = [hi - lo for lo, hi in box]
    axis = max(range(len(box) - 1), key=lambda axis: shape[axis])
    per_index = 2 * math.prod(shape) // shape[axis]
    count = max(1, _SCRATCH_BYTES // per_index)
    lo, hi = box[axis]
    for start in range(lo, hi, count):
        yield (*box[:axis], (start, min(start + count, hi)), *box[axis + 1 :])


def _weighted_sum(
    bits: npt.NDArray[np.uint16], offsets: npt.NDArray[np.int64], rows: U64, step: int, columns: U64
) -> tuple[int, bool]:
    """The sum over rows that lie `offsets` bytes from the first element, their elements `step`."""
    if kernels := library.load():
        odd = ctypes.c_uint8()
        starts = map(address, (bits, offsets, rows))
        weights = address(columns), columns.size
        total = kernels.weighted_sum(*starts, rows.size, step, *weights, ctypes.byref(odd))
        return total, bool(odd)
    total, found = 0, False
    span = (int(offsets[-1]) + step * (columns.size - 1)) // 2 + 1
    flat = np.lib.stride_tricks.as_strided(bits, (span,), (2,))
    reach = step // 2 * (columns.size - 1) + 1
    for offset, weight in zip((offsets // 2).tolist(), rows.tolist(), strict=True):
        row = flat[offset : offset + reach : step // 2]
        total += int((row.astype(np.uint64) * columns).sum(dtype=np.uint64)) * weight
        found = found or bool(((row & EXPONENT) == EXPONENT).any())
    return total & MASK, found


def by_layer(plan: Plan, parts: Iterable[tuple[int, int | None]]) -> dict[str, dict[int, int]]:
    """The fingerprint of each layer of each weight, from steps' numbers and their parts of it."""
    found: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for number, part in parts:
        if part is not None:
            step = plan.steps[number]
            layers = found[step.family.weight]
            layers[step.layer] = (layers[step.layer] + part) & MASK
    return {weight: dict(layers) for weight, layers in found.items()}


def listing(layers: Mapping[int, int]) -> dict[str, Any]:
    """The fingerprint of a whole parameter and of its layers, in order, as text."""
    parts = [layers[layer] for layer in sorted(layers)]
    weights = axis_weights(0, len(parts)).tolist()
    whole = sum(part * weight for part, weight in zip(parts, weights, strict=True)) & MASK
    return {"fingerprint": f"{whole:016x}", "layers": [f"{part:016x}" for part in parts]}

"""Evidence of the right base: copies of its tensors that an adapter carries, and lengths of rows
that DoRA starts from."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from statistics import median

from gptoss_convert.containers.paths import open_file
from gptoss_convert.errors import InputError
from gptoss_convert.formats.adapters.adapter import Adapter
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.updates import Update

_ROWS = 16
"""Rows of a copy that are held against the base's, spread over all of it."""
_APART = 0.25
"""DoRA's lengths begin as those of the base's rows, and training moves them by a few percent."""
_CODES = {"F32": "f", "F16": "e", "BF16": "H"}


def base_remarks(adapter: Adapter, base: Sequence[Extent]) -> Iterator[str]:
    """What contradicts that these extents are of the base that the adapter was trained on."""
    for copy in adapter.replaced:
        if copy.tensor not in adapter.base_copies or copy.dtype != "BF16":
            continue
        own = [extent for extent in base if extent.param == copy.param]
        lo, hi = copy.box[0]
        rows = range(lo, hi, max(1, (hi - lo) // _ROWS))
        other = [row for row in rows if _row(copy, row) != _row(_holder(own, row), row)]
        if other:
            yield (
                f"its copy of the base's {copy.tensor} differs from this base's in {len(other)} of "
                f"{len(rows)} rows compared: it was trained on another base"
            )

    apart = [ratio for one in adapter.updates[:_ROWS] for ratio in _lengths(one, base)]
    if apart and median(abs(ratio - 1) for ratio in apart) > _APART:
        yield (
            f"its DoRA lengths are {median(apart):.3g} times those of this base's rows, in the "
            "median: it was trained on another base"
        )


def _lengths(update: Update, base: Sequence[Extent]) -> Iterator[float]:
    """DoRA's lengths by those of the base's rows, for a few rows that lie together in BF16."""
    if update.magnitude is None or update.whole_axes != {update.axes[-1]}:
        return
    (stored,) = update.magnitude.extents[:1]
    for index in _some(update.box[:-1]):
        row = (*((i, i + 1) for i in index), update.box[-1])
        for extent in base:
            if extent.param == update.param and _is_run(row, extent):
                length = math.hypot(*_numbers(extent, row))
                yield _numbers(stored, row[:-1])[0] / length if length else math.inf


def _some(box: Box) -> Iterator[tuple[int, ...]]:
    """A few indexes of a box, spread over it."""
    count = math.prod(hi - lo for lo, hi in box)
    for number in range(0, count, max(1, count // 4)):
        index: list[int] = []
        for lo, hi in reversed(box):
            number, place = divmod(number, hi - lo)
            index.insert(0, lo + place)
        yield tuple(index)


def _is_run(row: Box, extent: Extent) -> bool:
    """Whether a row is BF16 values one after the other in this extent."""
    spans = zip(row, extent.box, strict=True)
    inside = all(first <= lo and hi <= last for (lo, hi), (first, last) in spans)
    return inside and extent.dtype == "BF16" and extent.strides[-1] == 2 and extent.packed is None


def _numbers(extent: Extent, box: Box) -> list[float]:
    """The values of a box whose bytes lie together."""
    with open_file(extent.file) as file:
        file.seek(extent.at(box))
        content = file.read(extent.span(box))
    code = _CODES[extent.dtype]
    found = struct.unpack(f"<{len(content) // struct.calcsize(code)}{code}", content)
    if extent.dtype != "BF16":
        return [float(one) for one in found]
    return [struct.unpack("<f", struct.pack("<I", one << 16))[0] for one in found]


def _holder(extents: Sequence[Extent], row: int) -> Extent:
    for extent in extents:
        if extent.box[0][0] <= row < extent.box[0][1]:
            return extent
    raise InputError(f"row {row} is stored nowhere")


def _row(extent: Extent, row: int) -> bytes:
    """The bytes of one row of a matrix, which lie together in every format."""
    if extent.packed is not None:
        raise InputError(f"{extent.tensor}: quantised in the base; convert that to BF16 first")
    box = ((row, row + 1), *extent.box[1:])
    with open_file(extent.file) as file:
        file.seek(extent.at(box))
        return file.read(extent.span(box))

"""Evidence of the right base: copies of the base's own tensors that an adapter carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gptoss_convert.containers.paths import open_file
from gptoss_convert.errors import InputError
from gptoss_convert.formats.adapters.adapter import Adapter
from gptoss_convert.layouts.extents import Extent

_ROWS = 16
"""Rows of a copy that are held against the base's, spread over all of it."""


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

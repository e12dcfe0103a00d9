"""Copies of strided views that keep every element, or compare them: relayout, casts to BF16."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.codecs.mxfp4 import axes, library
from gptoss_convert.codecs.mxfp4.library import Kernels, address, numbers
from gptoss_convert.codecs.mxfp4.reference import U8, U16, bf16_bits

Array = U8 | U16

_LARGE = 1 << 10
"""Elements from which a kernel call is worth its preparation."""

_SIDE = 8
"""Rows and columns from which the kernel beats numpy."""

_CHUNK = 1 << 16
"""Elements at a time in a cast."""


def copy(source: Array, target: Array) -> None:
    """Copy `source` to `target`, of the same shape and dtype (u8 or u16), any strides."""
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ValueError(
            f"target: expected {source.dtype} {source.shape}, found {target.dtype} {target.shape}"
        )
    crossing = _crossing(source, target)
    if crossing is None:
        np.copyto(target, source)
        return
    for kernels, arguments in crossing:
        kernels.transpose(*arguments)


def same_across(ours: Array, theirs: Array) -> bool | None:
    """Whether views of one shape and dtype have the same elements, where they run on along
    different axes; None where they do not, or without kernels."""
    crossing = _crossing(ours, theirs)
    if crossing is None:
        return None
    return all(kernels.same_transposed(*arguments) for kernels, arguments in crossing)


def _crossing(source: Array, target: Array) -> Iterator[tuple[Kernels, tuple]] | None:
    """The kernels and what they take, call by call, to pass over two views that run on along
    different axes; None if numpy should do it."""
    kernels = library.load()
    if kernels is None or source.dtype != np.uint16 or source.size < _LARGE:
        return None
    loops = zip(target.strides, source.strides, source.shape, strict=True)
    write, read, shape = zip(*sorted(loops, reverse=True), strict=True)
    outer = axes.merged(shape, read, write)
    columns, rows = _run(outer, 0), _run(outer, 1)
    if not columns or not rows or set(columns) & set(rows):
        return None
    outer = [axis for axis in outer if axis not in columns and axis not in rows]
    size = math.prod(axis.length for axis in rows), math.prod(axis.length for axis in columns)
    if min(size) < _SIDE:
        return None
    steps = numbers(_steps(rows, 0)), numbers(_steps(columns, 1))
    views = source, target
    return (
        (kernels, (*map(address, views, start), *size, *steps)) for start in axes.offsets(outer, 2)
    )


def _run(candidates: Sequence[axes.Axis], view: int) -> list[axes.Axis]:
    """The axis along which a view is contiguous; if it is one of pairs, also the one it runs on."""
    run = [axis for axis in candidates if axis.strides[view] == 2][:1]
    if run and run[0].length == 2:
        run += [axis for axis in candidates if axis.strides[view] == 4][:1]
    return run


def _steps(run: Sequence[axes.Axis], view: int) -> tuple[int, int]:
    """Steps of a view from pair to pair and within a pair, along a run."""
    step = run[0].strides[view]
    return (run[1].strides[view] if len(run) == 2 else 2 * step), step


def cast(source: NDArray[np.float32] | NDArray[np.float16], target: U16) -> int:
    """Round float32 or float16 to BF16 bits, to nearest even; returns how many values changed.

    NaN stays NaN and does not count as changed; overflow to an infinity does.
    """
    if source.shape != target.shape:
        raise ValueError(f"target: expected shape {source.shape}, found {target.shape}")
    changed = 0
    chunks = np.nditer(
        [source, target],
        flags=["external_loop", "buffered", "zerosize_ok"],
        op_flags=[["readonly"], ["writeonly"]],
        buffersize=_CHUNK,
    )
    with chunks:
        for values, bits in chunks:
            exact = np.ascontiguousarray(values, np.float32)
            rounded = bf16_bits(exact)
            back = (rounded.astype(np.uint32) << 16).view(np.float32)
            changed += int(np.count_nonzero((back != exact) & (exact == exact)))
            bits[...] = rounded
    return changed

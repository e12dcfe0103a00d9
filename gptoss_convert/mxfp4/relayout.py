"""Copies of strided views that keep every element: relayout, and casts to BF16."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.mxfp4.axes import Array
from gptoss_convert.mxfp4.reference import U16, bf16_bits

_CHUNK = 1 << 16
"""Elements at a time in a cast."""


def copy(source: Array, target: Array) -> None:
    """Copy `source` to `target`, of the same shape and dtype (u8 or u16), any strides."""
    if source.shape != target.shape or source.dtype != target.dtype:
        raise ValueError(
            f"target: expected {source.dtype} {source.shape}, found {target.dtype} {target.shape}"
        )
    np.copyto(target, source)


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

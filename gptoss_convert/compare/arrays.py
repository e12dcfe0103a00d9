"""How far two arrays of BF16 values are apart, in numbers that can be added up over steps."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs.mxfp4 import library, relayout
from gptoss_convert.codecs.mxfp4.axes import pieces
from gptoss_convert.codecs.mxfp4.library import address

_PIECE = 1 << 15
"""Elements that numpy looks at at once: their float64 forms stay in the cache."""
_AT_ONCE = 1 << 18
_EXPONENT = np.uint16(0x7F80)
Bits = npt.NDArray[np.uint16]


@dataclass(frozen=True, slots=True)
class Distance:
    """What differs between two sides of some elements; `sum_of` adds them up.

    Elements that are infinite or NaN on either side are counted, and left out of the sums.
    """

    elements: int = 0
    changed: int = 0
    """Elements whose bits differ."""
    nonfinite: int = 0
    squares: float = 0.0
    """Sum of the squares of the first side."""
    squared_change: float = 0.0
    """Sum of the squares of the differences."""
    max_abs: float = 0.0
    """The largest difference."""

    @property
    def share(self) -> float:
        """Changed elements, of all."""
        return self.changed / self.elements if self.elements else 0.0

    @property
    def relative_norm(self) -> float | None:
        """L2 norm of the difference over that of the first side; None if that one is zero."""
        if self.squared_change == 0:
            return 0.0
        return math.sqrt(self.squared_change / self.squares) if self.squares else None

    def summary(self) -> dict[str, int | float | None]:
        """The numbers as plain data."""
        return {
            "elements": self.elements,
            "changed": self.changed,
            "share": self.share,
            "relative_norm": self.relative_norm,
            "max_abs": self.max_abs,
            "nonfinite": self.nonfinite,
        }


class _Change(ctypes.Structure):
    """`struct change` of kernels.c."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("changed", "nonfinite")),
        *((name, ctypes.c_double * 8) for name in ("squares", "squared_change", "max_abs")),
    )


def everywhere(holds: Callable[..., npt.NDArray[np.bool_]], *arrays: npt.NDArray[Any]) -> bool:
    """Whether something holds of all elements of arrays of one shape, which may be views: piece by
    piece, so that it takes no memory that counts, and no longer than until it does not."""
    cuts = pieces(arrays[0].shape, _AT_ONCE)
    return all(holds(*(array[cut] for array in arrays)).all() for cut in cuts)


def equal(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> bool:
    """Whether two arrays of integers have one shape and the same elements."""
    if a.shape != b.shape:
        return False
    kernels = library.load()
    if kernels and a.dtype == b.dtype and a.flags.c_contiguous and b.flags.c_contiguous:
        return bool(kernels.same_bytes(address(a), address(b), a.nbytes))
    found = relayout.same_across(a, b) if a.dtype == b.dtype else None
    return everywhere(np.equal, a, b) if found is None else found


def sum_of(changes: Iterable[Distance]) -> Distance:
    """All of them together."""
    every = [*changes]
    return Distance(
        sum(one.elements for one in every),
        sum(one.changed for one in every),
        sum(one.nonfinite for one in every),
        math.fsum(one.squares for one in every),
        math.fsum(one.squared_change for one in every),
        max((one.max_abs for one in every), default=0.0),
    )


def distance(ours: Bits, theirs: Bits) -> Distance:
    """How far `theirs` lies from `ours`: BF16 bits, contiguous, of one shape."""
    a, b = ours.reshape(-1), theirs.reshape(-1)
    if kernels := library.load():
        found = _Change()
        a, b = map(np.ascontiguousarray, (a, b))
        kernels.compare(address(a), address(b), a.size, ctypes.byref(found))
        sums = sum(found.squares), sum(found.squared_change), max(found.max_abs)
        return Distance(a.size, found.changed, found.nonfinite, *sums)
    pieces = range(0, len(a), _PIECE)
    return sum_of(_by_numpy(a[i : i + _PIECE], b[i : i + _PIECE]) for i in pieces)


def _by_numpy(a: Bits, b: Bits) -> Distance:
    finite = ((a & _EXPONENT) != _EXPONENT) & ((b & _EXPONENT) != _EXPONENT)
    x = np.where(finite, _values(a), 0.0)
    error = np.where(finite, _values(b), 0.0) - x
    return Distance(
        len(a),
        int(np.count_nonzero(a != b)),
        len(a) - int(np.count_nonzero(finite)),
        float(np.square(x).sum()),
        float(np.square(error).sum()),
        float(np.abs(error).max(initial=0.0)),
    )


def _values(bits: Bits) -> npt.NDArray[np.float64]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)

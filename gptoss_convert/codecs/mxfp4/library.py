"""The compiled loops of kernels.c as a library, or None: then numpy gives the same bits, slower."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import Lock

import numpy as np

from gptoss_convert.errors import UsageError

PATH = Path(__file__).with_name("_kernels.abi3.so")
SOURCE = Path(__file__).with_name("kernels.c")
"""Part of a checkout, not of what is installed."""
VARIABLE = "GPTOSS_CONVERT_KERNELS"
LEVELS = "baseline", "avx2", "avx512"
"""What each kernel is compiled for, in the order of `level` in kernels.c."""

_LOCK = Lock()

_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int64, "u": ctypes.c_uint64, "-": None}
_TYPES |= {"d": ctypes.c_double, "f": ctypes.c_float}
_SIGNATURES = {
    "decode": "- pppiippi",
    "encode": "- ppppiiippip",
    "transpose": "- ppiipp",
    "weighted_sum": "u pppiipip",
    "packed_sum": "u pppppippi",
    "count_blocks": "- pip",
    "count_bytes": "- pip",
    "same_bytes": "i ppi",
    "same_decoded": "i pppiippi",
    "same_transposed": "i ppiipp",
    "compare": "- ppip",
    "add_exact": "i ppiippiidppp",
    "add_as_peft": "- ppiippiifi",
}
"""Of each kernel: what it returns, then its arguments. p: a pointer; i, u: 64 bits;
d, f: double and float; -: nothing."""


class Kernels:
    """The kernels for one kind of processor: they trust their arguments, and leave the GIL."""

    def __init__(self, loaded: ctypes.CDLL, level: str) -> None:
        for name, signature in _SIGNATURES.items():
            result, arguments = signature.split()
            function = getattr(loaded, f"{name}_{level}")
            function.restype, function.argtypes = _TYPES[result], [_TYPES[one] for one in arguments]
            setattr(self, name, function)

    def __getattr__(self, name: str) -> Callable[..., int]:
        raise AttributeError(name)


def load() -> Kernels | None:
    """The kernels for this processor; None, and one line on stderr, if they were not built.

    The environment variable GPTOSS_CONVERT_KERNELS chooses others: one of LEVELS, or numpy for
    None. Raises UsageError if this processor has not got them.
    """
    with _LOCK:  # Workers ask at the same time, and the line is to be said once.
        return _load(PATH, os.environ.get(VARIABLE))


@functools.cache
def _load(path: Path, chosen: str | None) -> Kernels | None:
    if chosen == "numpy":
        return None
    if problem := _problem():
        print(f"gptoss-convert: {problem}; using the slower numpy kernels", file=sys.stderr)
        return None
    loaded = ctypes.CDLL(str(path))
    usable = LEVELS[: loaded.level() + 1]
    if chosen and chosen not in usable:
        choices = ", ".join(("numpy", *usable))
        raise UsageError(f"{VARIABLE}: expected one of {choices} on this machine, found {chosen}")
    return Kernels(loaded, chosen or usable[-1])


def _problem() -> str:
    if sys.byteorder != "little":
        return "the compiled kernels are for little-endian machines"
    if is_stale():
        return "kernels.c is not compiled (python setup.py build_ext --inplace)"
    return "" if PATH.exists() else "no C compiler was found when this package was installed"


def is_stale() -> bool:
    """Whether this is a checkout whose kernels are older than their source, or missing."""
    if not SOURCE.exists():
        return False
    return not PATH.exists() or PATH.stat().st_mtime < SOURCE.stat().st_mtime


def address(array: np.ndarray, offset: int = 0) -> int:
    """Where an array's first element lies, plus `offset` bytes."""
    return array.ctypes.data + offset


def numbers(values: Sequence[int]) -> ctypes.Array[ctypes.c_int64]:
    """An array of int64 for a kernel."""
    return (ctypes.c_int64 * len(values))(*values)

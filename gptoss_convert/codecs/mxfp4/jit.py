"""Whether compiled kernels can be used, and how they are compiled: numba is imported here only."""

from __future__ import annotations

import functools
import importlib
import os
import pickle
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType


@functools.cache
def notice(message: str) -> None:
    """Say `message` on stderr, once."""
    print(f"gptoss-convert: {message}", file=sys.stderr)


@functools.cache
def kernels() -> ModuleType | None:
    """The module of compiled kernels; None if numba is missing or NUMBA_DISABLE_JIT is set."""
    if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        return None
    try:
        importlib.import_module("numba")
    except ImportError as error:
        notice(f"numba cannot be imported ({error}); using the slower numpy kernels")
        return None
    return importlib.import_module("gptoss_convert.codecs.mxfp4.kernels")


@functools.cache
def _checksum() -> int:
    """CRC-32 of this package's code, for the cache: numba's own key is a kernel's file alone."""
    sources = sorted(Path(__file__).parent.glob("*.py"))
    return zlib.crc32(b"".join(path.read_bytes() for path in sources))


def compiled(signature: str) -> Callable[[Callable], Callable]:
    """Compile a function for `signature` at definition, without the GIL, or load it from the cache.

    A cache that cannot be written or read costs a compilation in each process, not the run.
    """
    njit = importlib.import_module("numba").njit

    def compile_(function: Callable) -> Callable:
        function.__qualname__ += f"_{_checksum():08x}"
        try:
            return njit([signature], nogil=True, cache=True)(function)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError):
            notice(
                "compiled kernels cannot be cached, every run compiles them anew; "
                "set NUMBA_CACHE_DIR to a writable directory"
            )
            return njit([signature], nogil=True)(function)

    return compile_

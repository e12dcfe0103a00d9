"""MXFP4 and the copy kernels: from and to strided numpy views, exact or refused, without torch.

BF16 is carried as its bits in uint16. Compiled kernels do the bulk; where numba is missing or
NUMBA_DISABLE_JIT is set, numpy gives the same bits.
"""

from __future__ import annotations

from gptoss_convert.codecs.mxfp4 import jit
from gptoss_convert.codecs.mxfp4.codec import decode, encode, refuse_overflow
from gptoss_convert.codecs.mxfp4.relayout import cast, copy
from gptoss_convert.codecs.mxfp4.stats import EncodeStats

__all__ = ["EncodeStats", "cast", "copy", "decode", "encode", "refuse_overflow", "warm"]


def warm() -> None:
    """Compile or load every kernel, so that no later call waits for it."""
    jit.kernels()

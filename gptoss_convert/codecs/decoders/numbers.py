"""Small formats as float32, and float32 as BF16.

Sources: OCP Microscaling Formats 1.0 (E2M1, E8M0), OCP FP8 1.0 (E4M3).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.errors import CodecError

F32 = npt.NDArray[np.float32]

E2M1: F32 = np.array(
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0],
    np.float32,
)
"""By code."""
PAIRS: F32 = np.stack((np.tile(E2M1, 16), np.repeat(E2M1, 16)), axis=1)
"""The two values of a byte, low nibble first."""


def _e4m3() -> F32:
    codes = np.arange(256)
    exponent, fraction = codes >> 3 & 15, codes & 7
    normal = np.ldexp(8.0 + fraction, exponent - 10)
    values = np.where(exponent == 0, np.ldexp(fraction / 1.0, -9), normal)
    values[(codes & 127) == 127] = np.nan
    return np.where(codes & 128, -values, values).astype(np.float32)


E4M3 = _e4m3()
"""By byte; no infinities, two NaN."""


def floats(stored: npt.NDArray[Any], dtype: str) -> F32:
    """Stored elements as float32, exactly."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    if dtype == "F8_E4M3":
        return E4M3[stored.view(np.uint8)]
    return stored.astype(np.float32)


def bf16(values: F32) -> npt.NDArray[np.uint16]:
    """The bits of finite float32 values in BF16, to nearest even; raises CodecError where one is
    not finite, or not in BF16."""
    bits = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint32)
    rounded = (bits + (0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    odd = rounded & 0x7F80 == 0x7F80
    if odd.any() or not np.isfinite(values).all():
        raise CodecError(f"{int(odd.sum())} decoded values are infinite or NaN")
    return rounded

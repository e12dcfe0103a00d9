"""FP8: E4M3 values times float scales: one, one per row, or one per block of rows and columns.

The arithmetic is that of compressed-tensors (`weight_scale`) and of DeepSeek's form, with blocks of
128 x 128 (`weight_scale_inv`, which is a factor too, despite its name): float32, rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from gptoss_convert.codecs.decoders.decoder import Member, Stored
from gptoss_convert.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from gptoss_convert.codecs.decoders.decoder import Read, Values


class Fp8:
    """`codes` [.., rows, columns] and `scales`, of which one stands for `block_rows` x
    `block_columns` values; 0 stands for all of a matrix."""

    dtypes: Mapping[str, frozenset[str]] = MappingProxyType(
        {"codes": frozenset({"F8_E4M3"}), "scales": frozenset({"F32", "BF16", "F16"})}
    )

    def shape(self, members: Mapping[str, Member], numbers: Mapping[str, float]) -> tuple[int, ...]:
        shape, found = members["codes"].shape, members["scales"].shape
        if len(shape) < 2:
            raise InputError(f"codes have shape {shape}, expects matrices")
        grid = _grid(shape, numbers)
        if math.prod(found) not in {1, math.prod(grid)} or (
            math.prod(found) > 1 and [n for n in found if n > 1] != [n for n in grid if n > 1]
        ):
            raise InputError(f"scales have shape {found}, expects {grid}")
        return shape

    def decode(self, stored: Stored, first: int, last: int, read: Read) -> Values:
        import numpy as np

        from gptoss_convert.codecs.decoders.numbers import bf16, floats

        codes, scales = stored.members["codes"], stored.members["scales"]
        values = floats(read("codes", first, last), codes.dtype)
        if math.prod(scales.shape) == 1:
            chosen = floats(read("scales", 0, 1), scales.dtype)
        else:
            index = self._places(stored, np.arange(first, last))
            low, high = int(index.min()), int(index.max()) + 1
            chosen = floats(read("scales", low, high), scales.dtype)[index - low]
        with np.errstate(over="ignore", invalid="ignore"):
            return bf16(values * chosen)

    def _places(self, stored: Stored, values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Which scale stands for each value, both row-major."""
        *_, rows, columns = stored.shape
        *_, down, across = _grid(stored.shape, stored.numbers)
        row, column = values // columns, values % columns
        row_of = row // rows * down + row % rows // (int(stored.numbers["block_rows"]) or rows)
        return row_of * across + column // (int(stored.numbers["block_columns"]) or columns)


def _grid(shape: tuple[int, ...], numbers: Mapping[str, float]) -> tuple[int, ...]:
    """How many scales there are along each axis."""
    *matrices, rows, columns = shape
    down, across = int(numbers["block_rows"]) or rows, int(numbers["block_columns"]) or columns
    return (*matrices, -(-rows // down), -(-columns // across))


DECODER = Fp8()

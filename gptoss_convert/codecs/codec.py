"""What every codec can do, and where the codecs are found by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from gptoss_convert.codecs.stats import EncodeStats, ScaleStatistics
from gptoss_convert.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.uint16]
    """BF16 values as their bits; any strides."""
    Arrays = Mapping[str, npt.NDArray[Any]]
    """By member: an array whose axes are the member's."""
    Weights = Sequence[npt.NDArray[np.uint64]]

Ranges = tuple[tuple[int, int], ...]
"""A half-open range per axis."""


class Codec(Protocol):
    """One way to store a weight in other arrays, its members, which together are an encoding.

    Decoding is exact, encoding rounds. Both work on boxes of any number of rows and of whole
    blocks: so many values that follow one another along the weight's last axis belong together.
    What is asked of a codec before anything is computed needs no numpy.
    """

    @property
    def name(self) -> str:
        """Of its folder here, and of its table among the mappings."""
        ...

    @property
    def members(self) -> Mapping[str, str]:
        """The dtype of each member."""
        ...

    @property
    def block(self) -> int:
        """Values of a block."""
        ...

    @property
    def hints(self) -> tuple[str, ...]:
        """The members that, where a former encoding's are known, lead an encoding back to it."""
        ...

    @property
    def magnitudes(self) -> tuple[str, int]:
        """A member, and those of its bits that are all zero exactly where the values are."""
        ...

    def member_box(self, member: str, box: Ranges) -> Ranges:
        """The box of a member that holds a box of the weight: whole blocks, the cut ones too."""
        ...

    def decode(self, parts: Arrays, values: Values) -> None:
        """Fill `values` from all members; raises CodecError, before it writes, for what is not
        finite in BF16."""
        ...

    def encode(self, values: Values, parts: Arrays, hints: Arrays) -> EncodeStats:
        """Fill all members from `values`; hints decide between encodings of the same values."""
        ...

    def same(self, parts: Arrays, values: Values) -> bool:
        """Whether all members together stand for exactly these values, without a place for what
        they stand for; raises CodecError as `decode` does."""
        ...

    def statistics(self, parts: Arrays) -> ScaleStatistics:
        """What the blocks and their scales look like."""
        ...

    def weighted_sum(self, parts: Arrays, weights: Weights) -> int | None:
        """Σ bits·Πw modulo 2^64 over the values, w one of `weights` per axis, without a place for
        the values; None if the codec knows no quick way. Raises CodecError as `decode` does."""
        ...


@cache
def load_codec(name: str) -> Codec:
    """The codec of this name; raises InputError if there is none."""
    module = f"gptoss_convert.codecs.{name}"
    try:
        return import_module(module).CODEC
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(f"[{name}]: no codec has this name") from None

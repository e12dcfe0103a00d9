"""What every decoder can do, and where the decoders are found by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from gptoss_convert.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Values = npt.NDArray[np.uint16]
    """BF16 values as their bits."""
    Read = Callable[[str, int, int], npt.NDArray[Any]]
    """(member, first, last) -> its elements first..last-1, row-major; bits where numpy has no such
    dtype."""


@dataclass(frozen=True, slots=True)
class Member:
    """One stored tensor of an encoding."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """An encoded tensor: the shape of its values, its members, and what stands in no tensor."""

    shape: tuple[int, ...]
    members: Mapping[str, Member]
    numbers: Mapping[str, float]


class Decoder(Protocol):
    """One way in which other tools store a tensor in several.

    Decoding gives the values that the tool's own library gives in BF16, bit for bit. What is asked
    before anything is computed needs no numpy.
    """

    @property
    def dtypes(self) -> Mapping[str, frozenset[str]]:
        """The dtypes that each member may have."""
        ...

    def shape(self, members: Mapping[str, Member], numbers: Mapping[str, float]) -> tuple[int, ...]:
        """The shape of the values; raises InputError for members that do not belong together."""
        ...

    def decode(self, stored: Stored, first: int, last: int, read: Read) -> Values:
        """The values first..last-1, row-major; raises CodecError for what is not finite in BF16."""
        ...


@cache
def load_decoder(name: str) -> Decoder:
    """The decoder of this name; raises InputError if there is none."""
    module = f"{__name__.rpartition('.')[0]}.{name}"
    try:
        return import_module(module).DECODER
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise InputError(f"{name}: no decoder has this name") from None


def require(expected: Mapping[str, Sequence[int]], members: Mapping[str, Member]) -> None:
    """Raise InputError unless members have these shapes, axes of length 1 aside."""
    for name, shape in expected.items():
        found = members[name].shape
        if [n for n in found if n != 1] != [n for n in shape if n != 1]:
            raise InputError(f"{name} has shape {found}, expects {tuple(shape)}")

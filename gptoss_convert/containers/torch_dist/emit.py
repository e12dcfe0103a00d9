"""Opcodes of a pickle, for values whose classes are named and never imported.

Each function returns what pushes one value, in the opcodes of protocol 2 that Python's own pickler
writes for it: torch's weights-only reader knows all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

HEADER, STOP = b"\x80\x02", b"."
NONE, FALSE = b"N", b"\x89"
EMPTY_DICT, EMPTY_LIST = b"}", b"]"
SET_ITEM, APPEND = b"s", b"a"
PERSISTENT = b"Q"
NEW, SET_STATE = b")\x81", b"b"
"""After a class: an instance without arguments; after a state: the instance gets it."""
FIELDS, SET_FIELDS = NEW + EMPTY_DICT + b"(", b"u" + SET_STATE
"""After a class: an instance whose names and values of fields follow; and the end of these."""

_TUPLES = (b")", b"\x85", b"\x86", b"\x87")


def named(name: str) -> bytes:
    """A class, function or constant by its full name."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def string(value: str) -> bytes:
    """A string."""
    encoded = value.encode()
    return b"X" + len(encoded).to_bytes(4, "little") + encoded


def integer(value: int) -> bytes:
    """An integer, in the shortest form."""
    if 0 <= value < 1 << 8:
        return b"K" + value.to_bytes(1, "little")
    if 0 <= value < 1 << 16:
        return b"M" + value.to_bytes(2, "little")
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + value.to_bytes(4, "little", signed=True)
    bits = (value if value >= 0 else ~value).bit_length()
    raw = value.to_bytes(bits // 8 + 1, "little", signed=True)
    return b"\x8a" + len(raw).to_bytes(1, "little") + raw


def sequence(*values: bytes) -> bytes:
    """A tuple."""
    if len(values) < len(_TUPLES):
        return b"".join(values) + _TUPLES[len(values)]
    return b"(" + b"".join(values) + b"t"


def integers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers."""
    return sequence(*map(integer, values))


def call(function: bytes, *arguments: bytes) -> bytes:
    """What a function returns for arguments."""
    return function + sequence(*arguments) + b"R"


Key = TypeVar("Key")


class Shared(dict[Key, bytes]):
    """Values that a pickle repeats: `shared[key]` pushes one, from the second time on by number.

    What it gives must enter the pickle in the order in which it was asked for. All that enters one
    pickle takes its numbers from one `itertools.count()`.
    """

    def __init__(self, express: Callable[[Key], bytes], numbers: Iterator[int]) -> None:
        self.express = express
        self.numbers = numbers

    def __missing__(self, key: Key) -> bytes:
        number = next(self.numbers)
        self[key] = _numbered(b"h", b"j", number)
        return self.express(key) + _numbered(b"q", b"r", number)


def _numbered(short: bytes, long: bytes, number: int) -> bytes:
    if number < 1 << 8:
        return short + number.to_bytes(1, "little")
    return long + number.to_bytes(4, "little")

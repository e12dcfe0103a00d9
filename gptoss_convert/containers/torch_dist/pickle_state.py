"""The state of a pickle that is being read: stack, marks and memo, every step checked."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptoss_convert.containers.budget import OBJECTS, PICKLE
from gptoss_convert.errors import InputError, IntegrityError

MAX_BYTES = PICKLE.nbytes
"""Longest pickle that is read; the `.metadata` of a 120b checkpoint takes about 6 MB."""
MAX_OBJECTS = OBJECTS
"""Most containers, and most memo entries: 6 million; weights of 120b alone take half a million."""
MAX_KEY = 1 << 60
"""Numbers from here on can be chosen to have one hash: a dict of them takes quadratic time."""
_SET = 3
"""A set takes as much memory as so many other containers."""
MAX_DEPTH = 1000
"""Most marks open at once."""
MAX_INTEGER_BYTES = 32
"""Longest arbitrary-size integer: Python's conversions are quadratic in it."""


@dataclass(frozen=True, slots=True, eq=False)
class Construct:
    """The stand-in of a class or function: `make` turns its arguments into a neutral value."""

    name: str
    make: Callable[[tuple[object, ...]], object]


@dataclass(slots=True, eq=False)
class Record:
    """The stand-in of an instance: what its class would have been handed. Equal only to itself."""

    name: str
    args: tuple[object, ...]
    state: object = None


Vocabulary = Mapping[str, object]
"""Full name of a global -> its `Construct`, or the plain value that stands for it."""


U2 = struct.Struct("<H")
U4 = struct.Struct("<I")
I4 = struct.Struct("<i")
U8 = struct.Struct("<Q")
F8 = struct.Struct(">d")


class Machine:
    """Stack, marks and memo of one pickle. `stack` holds what was pushed since the last mark.

    Where `open`, a global outside the vocabulary becomes a record too, and so does whatever the
    pickle makes of such records: nothing of them is imported, called or looked up.
    """

    def __init__(self, pickled: bytes, vocabulary: Vocabulary, *, open: bool = False) -> None:
        self.pickled = pickled
        self.vocabulary = vocabulary
        self.open = open
        self.position = 0
        self.stack: list[object] = []
        self.below: list[list[object]] = []
        self.memo: dict[int, object] = {}
        self.objects = 0

    def result(self) -> object:
        """Return the one value left at the end of the pickle."""
        if self.position != len(self.pickled):
            surplus = len(self.pickled) - self.position
            raise InputError(f"{surplus} bytes follow the end of the pickle")
        if self.below or len(self.stack) != 1:
            raise InputError("pickle ends with other than one value")
        return self.stack[0]

    def take(self, size: int) -> bytes:
        """Return the next `size` bytes; their presence is checked before anything is allocated."""
        end = self.position + size
        if end > len(self.pickled):
            found = len(self.pickled) - self.position
            raise IntegrityError(f"pickle truncated: {size} bytes announced, {found} present")
        taken = self.pickled[self.position : end]
        self.position = end
        return taken

    def number(self, form: struct.Struct) -> int:
        """Return the next integer of a fixed width."""
        (value,) = form.unpack_from(self.pickled, self.position)
        self.position += form.size
        return value

    def line(self) -> str:
        """Return the next line, as the GLOBAL opcode writes names."""
        end = self.pickled.find(b"\n", self.position, self.position + 512)
        if end < 0:
            raise IntegrityError("pickle truncated in the name of a global")
        name = text(self.pickled[self.position : end])
        self.position = end + 1
        return name

    def build(self, value: object) -> None:
        """Push a new container, string or stand-in; their number is limited."""
        self.objects += _SET if type(value) is set else 1
        if self.objects > MAX_OBJECTS:
            raise InputError(f"pickle builds more than {MAX_OBJECTS} objects")
        self.stack.append(value)

    def remember(self, index: int) -> None:
        """Store the top of the stack in the memo, whose size is limited."""
        if len(self.memo) >= MAX_OBJECTS:
            raise InputError(f"pickle remembers more than {MAX_OBJECTS} objects")
        self.memo[index] = self.stack[-1]

    def memoize(self) -> None:
        """Store the top of the stack under the next free memo index."""
        if len(self.memo) >= MAX_OBJECTS:
            raise InputError(f"pickle remembers more than {MAX_OBJECTS} objects")
        self.memo[len(self.memo)] = self.stack[-1]

    def recall(self, index: int) -> None:
        """Push a memo entry."""
        try:
            self.stack.append(self.memo[index])
        except KeyError:
            raise InputError(f"pickle recalls memo entry {index}, which was never stored") from None

    def mark(self) -> None:
        """Begin a run of items; the depth of such runs is limited."""
        if len(self.below) >= MAX_DEPTH:
            raise InputError(f"pickle nests deeper than {MAX_DEPTH} levels")
        self.below.append(self.stack)
        self.stack = []

    def since_mark(self) -> list[object]:
        """Return the items pushed since the last mark, and end that run."""
        items = self.stack
        self.stack = self.below.pop()
        return items

    def resolve(self, module: object, name: object) -> None:
        """Push what stands for a global; InputError for an unknown one, unless `open`."""
        if not isinstance(module, str) or not isinstance(name, str):
            raise InputError("pickle names a global by something other than strings")
        full = f"{module}.{name}"
        if full in self.vocabulary:
            self.stack.append(self.vocabulary[full])
        elif self.open:
            self.build(recorded(ascii(full)[1:-1][:200]))
        else:
            raise InputError(f"pickle refers to {ascii(full)[1:-1][:200]}; not executed")

    def construct(self, args: object) -> None:
        """Replace the class on the stack by what its stand-in makes of `args`."""
        callee = self.stack.pop()
        if self.open and isinstance(callee, Record):
            callee = recorded(callee.name)
        if not isinstance(callee, Construct) or not isinstance(args, tuple):
            raise InputError("pickle calls something other than a known class; not executed")
        self.build(callee.make(args))

    def construct_with_keywords(self, args: object, keywords: object) -> None:
        """The same for a class that is given keywords as well, which only an inert one may be."""
        if keywords != {} and not self.open:
            raise InputError("pickle constructs with keywords")
        self.construct(args)

    def append(self, items: list[object]) -> None:
        """Extend the list on the stack."""
        target = self.stack[-1]
        if type(target) is list:
            target.extend(items)
        elif not self._inert(target):
            raise InputError("pickle appends to something other than a list")

    def set_items(self, items: list[object]) -> None:
        """Update the dict on the stack from alternating keys and values."""
        target = self.stack[-1]
        if self._inert(target):
            return
        if type(target) is not dict or len(items) % 2:
            raise InputError("pickle sets items of something other than a dict")
        for key in items[::2]:
            if type(key) is not str:
                require_key(key)
        target.update(zip(items[::2], items[1::2], strict=True))

    def set_state(self) -> None:
        """Give the instance below the top of the stack its state."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        # A dict may carry attributes beside its items, as the one of `Module.state_dict` does.
        elif not (self.open and type(target) is dict):
            raise InputError("pickle sets the state of something other than a known class")

    def _inert(self, target: object) -> bool:
        """Whether items are dropped: the target stands for a list or dict of an unknown class."""
        return self.open and isinstance(target, Record)


_FLAT = (str, int, float, bytes, Record, Construct, type(None))


def recorded(name: str) -> Construct:
    """A stand-in that keeps what it is given, and does nothing with it."""
    return Construct(name, lambda args: Record(name, args))


def text(encoded: bytes) -> str:
    """Return UTF-8 as a string."""
    try:
        return encoded.decode("utf-8")
    except UnicodeDecodeError:
        raise IntegrityError("pickle holds a string that is not UTF-8") from None


def require_key(key: object) -> None:
    """Raise InputError unless a value may be a key: hashing follows nested tuples without limit."""
    parts = key if type(key) is tuple else (key,)
    if not all(isinstance(part, _FLAT) for part in parts):
        raise InputError("pickle uses a nested or unhashable value as a key")
    if any(isinstance(part, int | float) and not -MAX_KEY < part < MAX_KEY for part in parts):
        raise InputError("pickle uses a number of more than 60 bits as a key")

"""A pickle reader that can build plain values and stand-ins, and nothing else.

It interprets the opcodes itself: no global is ever resolved and no object is ever called, except
the constructors of a vocabulary that the caller hands in. Memory stays in proportion to the length
of the pickle: every length is checked against the bytes present before it is used.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from gptoss_convert.containers.budget import PICKLE
from gptoss_convert.containers.torch_dist.pickle_state import (
    F8,
    I4,
    MAX_BYTES,
    MAX_INTEGER_BYTES,
    U2,
    U4,
    U8,
    Machine,
    Record,
    Vocabulary,
    require_key,
    text,
)
from gptoss_convert.errors import GptossError, InputError, IntegrityError

_STOP = ord(".")


def load(pickled: bytes, vocabulary: Vocabulary, where: str, *, open: bool = False) -> object:
    """Return the value of a pickle, foreign classes replaced by what `vocabulary` makes of them.

    A global outside the vocabulary becomes an inert `Record` where `open`, else an InputError.
    Raises InputError for opcodes that Python's own pickler (protocols 2 to 5) does not write and
    beyond the limits above; IntegrityError if truncated.
    """
    if len(pickled) > MAX_BYTES:
        raise InputError(f"{where}: pickle of {len(pickled)} bytes; at most {MAX_BYTES} are read")
    machine = Machine(pickled, vocabulary, open=open)
    try:
        return _run(machine)
    except GptossError as error:
        raise type(error)(f"{where}: {error}") from None
    except (IndexError, struct.error):
        raise IntegrityError(
            f"{where}: pickle truncated or malformed at byte {machine.position} of {len(pickled)}"
        ) from None


def _run(machine: Machine) -> object:
    pickled, operations = machine.pickled, _OPERATIONS
    for _ in range(PICKLE.parts):
        opcode = pickled[machine.position]
        machine.position += 1
        if opcode == _STOP:
            return machine.result()
        operation = operations.get(opcode)
        if operation is None:
            raise InputError(f"pickle opcode 0x{opcode:02x} is not supported; not executed")
        operation(machine)
    raise InputError(f"pickle of more than {PICKLE.parts} operations")


# The commonest opcodes of a large `.metadata` spare themselves a call.


def _recall_short(m: Machine) -> None:
    index = m.pickled[m.position]
    m.position += 1
    m.recall(index)


def _short_integer(m: Machine) -> None:
    m.stack.append(m.pickled[m.position])
    m.position += 1


def _long(machine: Machine, size: int) -> None:
    if size > MAX_INTEGER_BYTES:
        raise InputError(f"pickle holds an integer of {size} bytes")
    machine.stack.append(int.from_bytes(machine.take(size), "little", signed=True))


def _string(size: struct.Struct | None) -> Callable[[Machine], object]:
    def push(m: Machine) -> None:
        length = m.take(1)[0] if size is None else m.number(size)
        m.build(text(m.take(length)))

    return push


def _bytes(size: struct.Struct | None) -> Callable[[Machine], object]:
    def push(m: Machine) -> None:
        length = m.take(1)[0] if size is None else m.number(size)
        m.build(m.take(length))

    return push


def _tuple(size: int) -> Callable[[Machine], object]:
    def push(m: Machine) -> None:
        if len(m.stack) < size:
            raise IndexError
        items = tuple(m.stack[-size:])
        del m.stack[-size:]
        m.build(items)

    return push


def _constant(value: object) -> Callable[[Machine], object]:
    return lambda m: m.stack.append(value)


def _header(m: Machine) -> None:
    version = m.take(1)[0]
    if not 2 <= version <= 5:
        raise InputError(f"pickle protocol {version}; 2 to 5 are read")


def _frame(m: Machine) -> None:
    size = m.number(U8)
    if size > len(m.pickled) - m.position:
        raise IntegrityError("pickle truncated inside a frame")


def _stack_global(m: Machine) -> None:
    name, module = m.stack.pop(), m.stack.pop()
    m.resolve(module, name)


def _new_with_keywords(m: Machine) -> None:
    keywords, args = m.stack.pop(), m.stack.pop()
    m.construct_with_keywords(args, keywords)


def _add_items(m: Machine) -> None:
    items, target = m.since_mark(), m.stack[-1]
    if type(target) is not set:
        raise InputError("pickle adds to something other than a set")
    for item in items:
        require_key(item)
    target.update(items)


def _frozen_set(m: Machine) -> None:
    items = m.since_mark()
    for item in items:
        require_key(item)
    m.build(frozenset(items))


def _persistent(m: Machine) -> None:
    m.build(Record("persistent id", (m.stack.pop(),)))


_OPERATIONS: dict[int, Callable[[Machine], object]] = {
    ord(code): operation
    for code, operation in {
        "\x80": _header,
        "\x95": _frame,
        "(": Machine.mark,
        "0": lambda m: m.stack.pop() if m.stack else m.since_mark(),
        "1": lambda m: m.since_mark(),
        "\x94": Machine.memoize,
        "q": lambda m: m.remember(m.take(1)[0]),
        "r": lambda m: m.remember(m.number(U4)),
        "h": _recall_short,
        "j": lambda m: m.recall(m.number(U4)),
        "N": _constant(None),
        "\x88": _constant(True),
        "\x89": _constant(False),
        "K": _short_integer,
        "M": lambda m: m.stack.append(m.number(U2)),
        "J": lambda m: m.stack.append(m.number(I4)),
        "\x8a": lambda m: _long(m, m.take(1)[0]),
        "\x8b": lambda m: _long(m, m.number(U4)),
        "G": lambda m: m.stack.append(F8.unpack(m.take(8))[0]),
        "\x8c": _string(None),
        "X": _string(U4),
        "\x8d": _string(U8),
        "C": _bytes(None),
        "B": _bytes(U4),
        "\x8e": _bytes(U8),
        "\x96": _bytes(U8),
        ")": _constant(()),
        "\x85": _tuple(1),
        "\x86": _tuple(2),
        "\x87": _tuple(3),
        "t": lambda m: m.build(tuple(m.since_mark())),
        "]": lambda m: m.build([]),
        "}": lambda m: m.build({}),
        "\x8f": lambda m: m.build(set()),
        "a": lambda m: m.append([m.stack.pop()]),
        "e": lambda m: m.append(m.since_mark()),
        "s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
        "u": lambda m: m.set_items(m.since_mark()),
        "\x90": _add_items,
        "\x91": _frozen_set,
        "c": lambda m: m.resolve(m.line(), m.line()),
        "\x93": _stack_global,
        "R": lambda m: m.construct(m.stack.pop()),
        "\x81": lambda m: m.construct(m.stack.pop()),
        "\x92": _new_with_keywords,
        "b": Machine.set_state,
        "Q": _persistent,
    }.items()
}

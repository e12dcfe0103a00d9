"""Records, dataclasses of plain values, as JSON values and back, each field checked by its type.

A record is the list of its fields' values, a mapping the list of its pairs, bytes are hexadecimal.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import cache, partial
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

Record = TypeVar("Record")


def to_json(value: Any) -> Any:
    """A record, or what its fields hold, as JSON values."""
    if is_dataclass(value):
        return [to_json(getattr(value, field.name)) for field in fields(value)]
    if isinstance(value, Mapping):
        return [[to_json(key), to_json(one)] for key, one in value.items()]
    if isinstance(value, tuple | list):
        return [to_json(one) for one in value]
    return value.hex() if isinstance(value, bytes) else value


def from_json(kind: type[Record], value: Any) -> Record:
    """The record that `to_json` turned into these values; raises ValueError for anything else."""
    return _reader(kind)(value)


@cache
def _reader(kind: Any) -> Callable[[Any], Any]:
    """What reads values of a type."""
    if kind in (int, float, str, NoneType):
        return partial(_plain, kind)
    if kind is bytes:
        return lambda value: bytes.fromhex(_plain(str, value))
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        readers = [_reader(hints[field.name]) for field in fields(kind)]
        return lambda value: kind(*_each(readers, value))
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is UnionType:
        (reader,) = (_reader(one) for one in arguments if one is not NoneType)
        return lambda value: None if value is None else reader(value)
    if origin is Literal:
        return lambda value: arguments[arguments.index(value)]
    if origin is tuple and arguments[-1] is ...:
        reader = _reader(arguments[0])
        return lambda value: tuple(map(reader, _plain(list, value)))
    readers = [*map(_reader, arguments)]
    if origin is tuple:
        return lambda value: tuple(_each(readers, value))
    if origin is Mapping:
        return lambda value: dict(_each(readers, pair) for pair in _plain(list, value))
    raise TypeError(f"{kind} is no type of a record's field")


def _each(readers: Sequence[Callable[[Any], Any]], value: Any) -> list[Any]:
    return [read(one) for read, one in zip(readers, _plain(list, value), strict=True)]


def _plain(kind: type[Any], value: Any) -> Any:
    """A value of just this type: a bool is no integer, and an integer takes 64 bits."""
    if type(value) is not kind or (kind is int and not -1 <= value < 1 << 64):
        raise ValueError(f"expected {kind.__name__}, found {value!r:.40}")
    return value

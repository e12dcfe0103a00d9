"""The common state: training arguments and run state, reduced to plain data."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from pathlib import PurePosixPath

from gptoss_convert.containers import budget
from gptoss_convert.containers.torch_dist import pickles
from gptoss_convert.containers.torch_dist.items import describe_tensor, pickled_record, strip_root
from gptoss_convert.containers.torch_dist.pickle_state import Construct, Record
from gptoss_convert.containers.torch_dist.stand_ins import COMMON, PATH, Storage
from gptoss_convert.containers.torch_dist.zips import ReadAt, read_archive
from gptoss_convert.errors import InputError, IntegrityError

MAX_PICKLE_BYTES = budget.COMMON.nbytes
_MAX_VALUES = 1 << 20
_MAX_TEXT = 1 << 26
_MAX_DEPTH = 100


class Opaque(str):
    """Stands for a value that is no plain data: the name of its class."""

    __slots__ = ()


def parse(read_at: ReadAt, length: int, where: str) -> dict[str, object]:
    """Return the dict in a `torch.save` archive of `length` bytes as plain data; see `plain`.

    core 0.19 and later wrap the dict in a list of one. IntegrityError for a wrong checksum.
    """
    value = _load(read_at, length, where)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return plain(value, where)


def parse_namespace(read_at: ReadAt, length: int, where: str) -> dict[str, object]:
    """Return the attributes of the one object in a `torch.save` archive as plain data."""
    value = _load(read_at, length, where)
    return plain(value.state if isinstance(value, Record) else value, where)


def plain(value: object, where: str) -> dict[str, object]:
    """Return a dict as plain data.

    Lists, tuples, dicts, strings, numbers, None stay; namespaces become dicts, known enums and
    paths strings, everything else `Opaque`: trainers keep objects of their own classes there.
    InputError for values that expand without bound.
    """
    if not isinstance(value, dict):
        raise InputError(f"{where}: expected a dict, found {type(value).__name__}")
    args = value.get("args")
    if isinstance(args, Record) and isinstance(args.state, dict):
        # Arguments are a namespace, whatever a trainer calls its class.
        value["args"] = args.state
    found = _Plain(where).convert(value, 0)
    assert isinstance(found, dict)
    return {str(key): item for key, item in found.items()}


def _load(read_at: ReadAt, length: int, where: str) -> object:
    archive = read_archive(read_at, length, where)
    members = strip_root(archive.members, where)
    pickled = pickled_record(members, read_at, MAX_PICKLE_BYTES, where)
    # Zero stands for "not computed": torch can be told to write none.
    if members["data.pkl"].crc not in (0, zlib.crc32(pickled)):
        raise IntegrityError(f"{where}: data.pkl does not match its checksum")
    return pickles.load(pickled, COMMON, where, open=True)


@dataclass(slots=True)
class _Plain:
    """Converts a value; counts what it visits, as shared parts can expand exponentially."""

    where: str
    values: int = 0
    text: int = 0

    def convert(self, value: object, depth: int) -> object:
        self.values += 1
        self.text += len(value) if isinstance(value, str | bytes) else 0
        if self.values > _MAX_VALUES or self.text > _MAX_TEXT or depth > _MAX_DEPTH:
            raise InputError(f"{self.where}: nests too deep or expands to too many values")
        if value is None or isinstance(value, str | int | float | bytes):
            return value
        if isinstance(value, dict):
            return {self.key(k): self.convert(v, depth + 1) for k, v in value.items()}
        if isinstance(value, list | tuple | set | frozenset):
            items = [self.convert(item, depth + 1) for item in value]
            return tuple(items) if isinstance(value, tuple) else items
        if isinstance(value, Record):
            return self.record(value, depth)
        if isinstance(value, Storage):
            return Opaque(f"torch storage {value.dtype}")
        return Opaque(value.name if isinstance(value, Construct) else "foreign value")

    def key(self, key: object) -> object:
        return key if isinstance(key, str | int) else str(self.convert(key, _MAX_DEPTH - 2))[:200]

    def record(self, record: Record, depth: int) -> object:
        if record.name in ("argparse.Namespace", "types.SimpleNamespace"):
            return self.convert(record.state if record.state is not None else {}, depth + 1)
        if record.name == PATH:
            self.convert(record.args, depth + 1)
            return str(PurePosixPath(*(part for part in record.args if isinstance(part, str))))
        if record.name == "tensor":
            tensor = describe_tensor(record, self.where)
            return Opaque(f"tensor {tensor.dtype} of {math.prod(tensor.shape)} elements")
        return Opaque(record.name)

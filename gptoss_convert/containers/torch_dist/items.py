"""Tensor items: each is a `torch.save` file of one tensor inside a `.distcp` file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.containers.torch_dist import pickles
from gptoss_convert.containers.torch_dist.metadata import Item
from gptoss_convert.containers.torch_dist.pickle_state import Record
from gptoss_convert.containers.torch_dist.stand_ins import DTYPE_NAMES, TENSOR, Storage
from gptoss_convert.containers.torch_dist.zips import Archive, Member, ReadAt, read_archive
from gptoss_convert.errors import InputError, IntegrityError

MAX_PICKLE_BYTES = 1 << 16
MAX_SMALL_RECORD = 64


@dataclass(frozen=True, slots=True)
class _Template:
    """All bytes of an item that say where its data lies; CRCs of the data are blank."""

    head: bytes
    tail: bytes
    crc_fields: tuple[int, ...]


@dataclass(slots=True)
class ItemLocator:
    """Finds the data inside items. State: the last fully checked item of each kind.

    A checkpoint holds tens of thousands of items that differ in nothing but their data. An item
    whose bytes around the data equal those of a checked one has its data at the same place; any
    other item is parsed and checked in full.
    """

    templates: dict[tuple[str, tuple[int, ...], int], _Template] = field(default_factory=dict)

    def locate(
        self, read_at: ReadAt, item: Item, dtype: str, extent: tuple[int, ...], where: str
    ) -> int:
        """Return the offset, in the file, of the first element of a tensor item.

        Raises IntegrityError if the item holds another dtype or shape than declared, InputError if
        it is compressed, big-endian or not row-major.
        """
        kind = (dtype, extent, item.length)
        template = self.templates.get(kind)
        if template is not None and _matches(template, read_at, item):
            return item.offset + len(template.head)

        read_item = within(read_at, item, where)
        archive = read_archive(read_item, item.length, where)
        data = _data_offset(archive, read_item, dtype, extent, where)
        if data <= MAX_PICKLE_BYTES:
            tail = read_item(archive.directory, item.length - archive.directory)
            crc_fields = tuple(at - archive.directory for at in archive.crc_fields)
            self.templates[kind] = _Template(
                read_item(0, data), _blank(tail, crc_fields), crc_fields
            )
        return item.offset + data


def within(read_at: ReadAt, item: Item, where: str) -> ReadAt:
    """Return a reader of one item: offsets count from its start, ranges stay inside it."""

    def read_item(offset: int, size: int) -> bytes:
        if offset + size > item.length:
            raise IntegrityError(f"{where}: item truncated")
        return read_at(item.offset + offset, size)

    return read_item


def _matches(template: _Template, read_at: ReadAt, item: Item) -> bool:
    if read_at(item.offset, len(template.head)) != template.head:
        return False
    tail_size = len(template.tail)
    tail = read_at(item.offset + item.length - tail_size, tail_size)
    return _blank(tail, template.crc_fields) == template.tail


def _blank(tail: bytes, crc_fields: tuple[int, ...]) -> bytes:
    blanked = bytearray(tail)
    for at in crc_fields:
        blanked[at : at + 4] = bytes(4)
    return bytes(blanked)


def _data_offset(
    archive: Archive, read_item: ReadAt, dtype: str, extent: tuple[int, ...], where: str
) -> int:
    """Return the offset of the tensor's first element in its item, after checking all of it."""
    members = strip_root(archive.members, where)
    order = small_record(members, "byteorder", read_item, where)
    if order not in (None, b"little"):
        raise InputError(f"{where}: byte order {order!r}; only little-endian tensors are read")
    pickled = pickled_record(members, read_item, MAX_PICKLE_BYTES, where)
    found = describe_tensor(pickles.load(pickled, TENSOR, where), where)
    if (found.dtype, found.shape) != (dtype, extent):
        raise IntegrityError(
            f"{where}: declared {dtype} {extent}, the item holds {found.dtype} {found.shape}"
        )
    if not is_row_major(found.shape, found.stride):
        raise InputError(f"{where}: strides {found.stride} of shape {found.shape} not row-major")
    data = members.get(f"data/{found.key}")
    item_size = DTYPE_BYTES[DTYPE_NAMES[dtype]]
    needed = (found.offset + math.prod(extent)) * item_size
    if data is None or data.size != found.numel * item_size or needed > data.size:
        size = "no" if data is None else data.size
        raise IntegrityError(f"{where}: {found.numel} elements of {dtype} in {size} bytes")
    return data.offset + found.offset * item_size


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """What the pickle of a `torch.save` file says of a tensor; offsets and strides in elements."""

    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    key: str
    numel: int


def describe_tensor(value: object, where: str) -> TensorRecord:
    """Return the tensor that `_rebuild_tensor_v2` would have built."""
    if isinstance(value, Record) and value.name == "tensor" and len(value.args) >= 4:
        storage, offset, shape, stride = value.args[:4]
        pid = storage.args[0] if isinstance(storage, Record) and storage.args else None
        if isinstance(pid, tuple) and len(pid) == 5 and pid[0] == "storage":
            _, kind, key, _, numel = pid
            dims, steps = _counts(shape), _counts(stride)
            if (
                isinstance(kind, Storage)
                and isinstance(key, str)
                and type(numel) is int
                and type(offset) is int
                and min(offset, numel) >= 0
                and dims is not None
                and steps is not None
            ):
                return TensorRecord(kind.dtype, dims, steps, offset, key, numel)
    raise InputError(f"{where}: the item's pickle is not one plain tensor")


def _counts(value: object) -> tuple[int, ...] | None:
    if not isinstance(value, tuple):
        return None
    counts = tuple(v for v in value if type(v) is int and 0 <= v < 1 << 48)
    return counts if len(counts) == len(value) else None


def is_row_major(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether strides, in elements, are those of a contiguous tensor of this shape."""
    if len(shape) != len(stride):
        return False
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return False
        expected *= size
    return True


def strip_root(members: Mapping[str, Member], where: str) -> dict[str, Member]:
    """Return the records of a `torch.save` archive without the folder they all lie in."""
    roots = {name.partition("/")[0] for name in members}
    if len(roots) != 1:
        raise InputError(f"{where}: not a torch.save archive: records in {len(roots)} folders")
    return {name.partition("/")[2]: member for name, member in members.items()}


def small_record(
    members: Mapping[str, Member], name: str, read_item: ReadAt, where: str
) -> bytes | None:
    """Return a short record's bytes, None if the archive has no such record."""
    member = members.get(name)
    if member is None:
        return None
    if member.size > MAX_SMALL_RECORD:
        raise InputError(f"{where}: record {name} of {member.size} bytes")
    return read_item(member.offset, member.size)


def pickled_record(
    members: Mapping[str, Member], read_item: ReadAt, limit: int, where: str
) -> bytes:
    """Return the archive's pickle, `data.pkl`."""
    member = members.get("data.pkl")
    if member is None or member.size > limit:
        raise InputError(f"{where}: no data.pkl of at most {limit} bytes")
    return read_item(member.offset, member.size)

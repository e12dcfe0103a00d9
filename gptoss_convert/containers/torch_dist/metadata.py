"""`.metadata`: which tensors and objects a checkpoint holds, and in which part of which file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gptoss_convert.containers.paths import safe_name
from gptoss_convert.containers.torch_dist import pickles
from gptoss_convert.containers.torch_dist.pickle_state import Record
from gptoss_convert.containers.torch_dist.stand_ins import METADATA
from gptoss_convert.errors import InputError, IntegrityError

MAX_AXES = 16
MAX_NAME = 512


@dataclass(frozen=True, slots=True)
class ChunkBox:
    """A part of a tensor: index of its first element, and its shape."""

    start: tuple[int, ...]
    extent: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Item:
    """A byte range of a `.distcp` file that holds one serialized box or object."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor as `.metadata` declares it; `dtype` is torch's name."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    items: Mapping[ChunkBox, Item]


@dataclass(frozen=True, slots=True)
class Metadata:
    """The contents of `.metadata`, paths checked, every tensor's boxes matched with their items."""

    tensors: tuple[StoredTensor, ...]
    objects: Mapping[str, Item]


def parse(pickled: bytes, where: str) -> Metadata:
    """Return the contents of a `.metadata` file; nothing in it is executed.

    Raises InputError for foreign globals and unsafe paths, IntegrityError where the declared boxes
    and the stored items are not the same set.
    """
    root = pickles.load(pickled, METADATA, where)
    try:
        fields = _fields(root, "Metadata")
        declared = _mapping(fields, "state_dict_metadata")
        items = _items(_mapping(fields, "storage_data"))
        tensors = tuple(_tensors(declared, items))
        objects = {name: _take(items, name, None) for name in _object_names(declared)}
        if items:
            name, start = next(iter(items))
            raise IntegrityError(f"{name}: item at {start} is stored but not declared")
    except (InputError, IntegrityError) as error:
        raise type(error)(f"{where}: {error}") from None
    return Metadata(tensors, objects)


_Items = dict[tuple[str, tuple[int, ...] | None], Item]


def _tensors(declared: dict[object, object], items: _Items) -> Iterator[StoredTensor]:
    for key, value in declared.items():
        if _kind(value) != "TensorStorageMetadata":
            continue
        name = _name(key)
        fields = _fields(value, "TensorStorageMetadata")
        shape = _dims(fields.get("size"), name)
        boxes = [_box(chunk, name, len(shape)) for chunk in _list(fields.get("chunks"), name)]
        dtype = _dtype(fields.get("properties"), name)
        placed = {box: _take(items, name, box.start) for box in boxes}
        if 0 not in shape:
            # Ranks beyond the last row write a chunk of no rows: torch cuts by ceil(rows / ranks).
            placed = {box: item for box, item in placed.items() if 0 not in box.extent}
        yield StoredTensor(name, dtype, shape, placed)


def _object_names(declared: dict[object, object]) -> Iterator[str]:
    for key, value in declared.items():
        kind = _kind(value)
        if kind == "BytesStorageMetadata":
            yield _name(key)
        elif kind != "TensorStorageMetadata":
            raise InputError(f"{_name(key)}: declared as {kind}, neither a tensor nor an object")


def _items(storage: dict[object, object]) -> _Items:
    items: _Items = {}
    for key, value in storage.items():
        index = _fields(key, "MetadataIndex")
        name = _name(index.get("fqn"))
        offset = index.get("offset")
        start = None if offset is None else _dims(offset, name)
        if (name, start) in items:
            raise IntegrityError(f"{name}: item at {start} is stored twice")
        items[name, start] = _item(value, name)
    return items


def _item(value: object, name: str) -> Item:
    info = _fields(value, "_StorageInfo")
    file, offset, length = (info.get(key) for key in ("relative_path", "offset", "length"))
    if info.get("transform_descriptors"):
        raise InputError(f"{name}: stored through a transform (compressed or encrypted)")
    if type(offset) is not int or type(length) is not int or not isinstance(file, str):
        raise InputError(f"{name}: malformed storage location")
    if not (0 <= offset < 1 << 63 and 0 < length < 1 << 63):
        raise IntegrityError(f"{name}: {length} bytes at {offset} is not a range of a file")
    return Item(_safe_path(file, name), offset, length)


def _safe_path(path: str, name: str) -> str:
    """Refuse a path that could name anything outside the checkpoint directory, on any system."""
    if not safe_name(path, folders=True):
        raise InputError(f"{name}: storage path {path[:200]!a} leaves the checkpoint directory")
    return path


def _take(items: _Items, name: str, start: tuple[int, ...] | None) -> Item:
    item = items.pop((name, start), None)
    if item is None:
        raise IntegrityError(
            f"{name}: item at {start} is declared but not stored, or declared twice"
        )
    return item


def _box(chunk: object, name: str, axes: int) -> ChunkBox:
    fields = _fields(chunk, "ChunkStorageMetadata")
    start, extent = _dims(fields.get("offsets"), name), _dims(fields.get("sizes"), name)
    if len(start) != axes or len(extent) != axes:
        raise IntegrityError(f"{name}: chunk {start} + {extent} has not the tensor's {axes} axes")
    return ChunkBox(start, extent)


def _dtype(properties: object, name: str) -> str:
    """`TensorProperties` keeps its state as a tuple, dtype first."""
    state = _record(properties, "TensorProperties").state
    dtype = state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, str):
        raise InputError(f"{name}: tensor properties name no dtype")
    return dtype


def _dims(value: object, name: str) -> tuple[int, ...]:
    if not isinstance(value, tuple) or len(value) > MAX_AXES:
        raise InputError(f"{name}: expected a shape of at most {MAX_AXES} axes")
    dims = tuple(dim for dim in value if type(dim) is int and 0 <= dim < 1 << 48)
    if len(dims) != len(value):
        raise InputError(f"{name}: a shape or offset is not a tuple of non-negative integers")
    return dims


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= MAX_NAME:
        raise InputError(f"an entry's name is not a printable string of 1 to {MAX_NAME} characters")
    return value


def _kind(value: object) -> str:
    return value.name.rpartition(".")[2] if isinstance(value, Record) else type(value).__name__


def _record(value: object, kind: str) -> Record:
    if not isinstance(value, Record) or _kind(value) != kind:
        raise InputError(f"expected {kind}, found {_kind(value)}")
    return value


def _fields(value: object, kind: str) -> dict[object, object]:
    state = _record(value, kind).state
    if not isinstance(state, dict):
        raise InputError(f"{kind} has no fields")
    return state


def _mapping(fields: dict[object, object], key: str) -> dict[object, object]:
    value = fields.get(key)
    if not isinstance(value, dict):
        raise InputError(f"Metadata has no {key}")
    return value


def _list(value: object, name: str) -> list[object]:
    if not isinstance(value, list) or not value:
        raise InputError(f"{name}: declares no chunks")
    return value

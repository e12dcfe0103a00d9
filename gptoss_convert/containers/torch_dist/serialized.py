"""What torch would pickle in an iteration directory: `.metadata`, `common.pt`, `_extra_state`.

torch is not imported; the tests hold the results against torch's own classes and pickles
(docs/decisions/0005-no-torch-to-write.md).
"""

from __future__ import annotations

import pickle
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from itertools import count

from gptoss_convert.containers import TensorSpec
from gptoss_convert.containers.torch_dist import emit
from gptoss_convert.containers.torch_dist.item_form import ItemForm, archive, tensor
from gptoss_convert.containers.torch_dist.metadata import ChunkBox, Item

_DCP = "torch.distributed.checkpoint"
_METADATA = f"{_DCP}.metadata.Metadata"
_TENSOR = f"{_DCP}.metadata.TensorStorageMetadata"
_OBJECT = f"{_DCP}.metadata.BytesStorageMetadata"
_PROPERTIES = f"{_DCP}.metadata.TensorProperties"
_MEMORY_FORMAT = f"{_DCP}.metadata._MEM_FORMAT_ENCODING"
_CHUNK = f"{_DCP}.metadata.ChunkStorageMetadata"
_INDEX = f"{_DCP}.metadata.MetadataIndex"
_META = f"{_DCP}.metadata.StorageMeta"
_PLACE = f"{_DCP}.filesystem._StorageInfo"
_LAYOUT = "torch.serialization._get_layout"
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "U8": "uint8"}
_CONTIGUOUS = 0
_VERSION = "1.0.0"
_PROTOCOL = 2
"""Of the pickle in every `torch.save` file."""


def common(state: Mapping[str, object]) -> bytes:
    """Return `common.pt`, as `torch.save` writes it: the same bytes for an equal state.

    It holds None, numbers, strings, lists, tuples, dicts and Namespaces; TypeError for others.
    """
    return _whole(archive(pickle.dumps(_plain(dict(state)), protocol=_PROTOCOL)))


def _plain(value: object) -> object:
    """A copy whose equal strings are one object: pickle shares by identity, and so by value."""
    if value is None or type(value) in (bool, int, float):
        return value
    # Exact types: a numpy number is a float, and its pickle names numpy.
    if type(value) is str:
        return sys.intern(value)
    if type(value) is list:
        return [_plain(item) for item in value]
    if type(value) is tuple:
        return tuple(_plain(item) for item in value)
    if type(value) is dict:
        return {_plain(key): _plain(item) for key, item in value.items()}
    if type(value) is Namespace:
        return Namespace(**{key: _plain(item) for key, item in vars(value).items()})
    kind = type(value).__name__
    raise TypeError(f"common state: expected plain values, found {kind} {value!r}")


def extra_state_objects(names: Iterable[str]) -> Mapping[str, bytes]:
    """Return the object each `_extra_state` name must have: a list of one empty uint8 tensor.

    megatron-core wraps objects in a list; TransformerEngine reads an empty tensor as "no FP8
    state", and modules of the local spec ignore it.
    """
    listed = emit.EMPTY_LIST + tensor("U8", (0,)) + emit.APPEND
    return dict.fromkeys(names, _whole(archive(emit.HEADER + listed + emit.STOP, 0)))


def _whole(form: ItemForm) -> bytes:
    return form.prefix + form.suffix


def metadata(
    stored: Sequence[tuple[TensorSpec, ChunkBox, Item]], objects: Mapping[str, Item]
) -> bytes:
    """Return `.metadata` for tensors cut into boxes, and for objects."""
    tensors: dict[str, tuple[TensorSpec, list[ChunkBox]]] = {}
    for spec, box, _ in stored:
        tensors.setdefault(spec.name, (spec, []))[1].append(box)
    dcp = _Classes()
    parts = [emit.HEADER, emit.named(_METADATA), emit.FIELDS]
    parts += (emit.string("state_dict_metadata"), emit.EMPTY_DICT)
    parts += (dcp.tensor(spec, boxes) + emit.SET_ITEM for spec, boxes in tensors.values())
    parts += (dcp.object(name) + emit.SET_ITEM for name in objects)
    parts += (emit.string("planner_data"), emit.NONE)
    parts += (emit.string("storage_data"), emit.EMPTY_DICT)
    parts += (
        dcp.index(spec.name, box.start) + dcp.place(item) + emit.SET_ITEM
        for spec, box, item in stored
    )
    parts += (dcp.index(name, None) + dcp.place(objects[name]) + emit.SET_ITEM for name in objects)
    parts += (emit.string("storage_meta"), dcp.storage_meta())
    parts += (emit.string("version"), emit.string(_VERSION), emit.SET_FIELDS, emit.STOP)
    return b"".join(parts)


class _Classes:
    """Instances of DCP's classes; each enters the pickle in the order in which it was made.

    Fields stand in the order in which torch's own instances hold them.
    """

    def __init__(self) -> None:
        numbers = count()
        self.named = emit.Shared(emit.named, numbers)
        self.strings = emit.Shared(emit.string, numbers)
        self.sizes = emit.Shared(self._size, numbers)
        self.properties = emit.Shared(self._properties, numbers)

    def tensor(self, spec: TensorSpec, boxes: Iterable[ChunkBox]) -> bytes:
        parts = [self.strings[spec.name], self.named[_TENSOR], emit.FIELDS]
        parts += (self.strings["properties"], self.properties[spec.dtype])
        parts += (self.strings["size"], self.sizes[spec.shape])
        parts += (self.strings["chunks"], emit.EMPTY_LIST)
        parts += (self._chunk(box) for box in boxes)
        return b"".join((*parts, emit.SET_FIELDS))

    def object(self, name: str) -> bytes:
        return self.strings[name] + self.named[_OBJECT] + emit.NEW

    def index(self, name: str, start: tuple[int, ...] | None) -> bytes:
        parts = [self.named[_INDEX], emit.FIELDS, self.strings["fqn"], self.strings[name]]
        parts += (self.strings["index"], emit.NONE)
        if start is not None:
            parts += (self.strings["offset"], self.sizes[start])
        return b"".join((*parts, emit.SET_FIELDS))

    def place(self, item: Item) -> bytes:
        strings = self.strings
        parts = [self.named[_PLACE], emit.FIELDS]
        parts += (strings["relative_path"], strings[item.file])
        parts += (strings["offset"], emit.integer(item.offset))
        parts += (strings["length"], emit.integer(item.length), emit.SET_FIELDS)
        return b"".join(parts)

    def storage_meta(self) -> bytes:
        parts = [self.named[_META], emit.FIELDS]
        for field in ("checkpoint_id", "save_id", "load_id"):
            parts += (self.strings[field], emit.NONE)
        return b"".join((*parts, self.strings["modules"], emit.EMPTY_LIST, emit.SET_FIELDS))

    def _chunk(self, box: ChunkBox) -> bytes:
        parts = [self.named[_CHUNK], emit.FIELDS]
        parts += (self.strings["offsets"], self.sizes[box.start])
        parts += (self.strings["sizes"], self.sizes[box.extent])
        return b"".join((*parts, emit.SET_FIELDS, emit.APPEND))

    def _size(self, dims: tuple[int, ...]) -> bytes:
        return emit.call(self.named["torch.Size"], emit.integers(dims))

    def _properties(self, dtype: str) -> bytes:
        """dtype, layout, requires_grad, memory format, pin_memory; only dtype matters."""
        state = emit.sequence(
            emit.named(f"torch.{_DTYPES[dtype]}"),
            emit.call(emit.named(_LAYOUT), emit.string("torch.strided")),
            emit.FALSE,
            emit.call(emit.named(_MEMORY_FORMAT), emit.integer(_CONTIGUOUS)),
            emit.FALSE,
        )
        return self.named[_PROPERTIES] + emit.NEW + state + emit.SET_STATE

"""What only torch's own classes can serialize: `.metadata`, `common.pt` and `_extra_state`."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields

import torch
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]  # part of the on-disk format
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from gptoss_convert.containers import TensorSpec
from gptoss_convert.containers.torch_dist.metadata import Box, Item

_DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
}
_PROTOCOL = 4
_VERSION = "1.0.0"


def saved(value: object) -> bytes:
    """Return what `torch.save` writes for a value: the same bytes for an equally built value."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def extra_state_objects(names: Iterable[str]) -> Mapping[str, bytes]:
    """Return the object each `_extra_state` name must have: a list of one empty uint8 tensor.

    megatron-core wraps objects in a list; TransformerEngine reads an empty tensor as "no FP8
    state", and modules of the local spec ignore it.
    """
    return dict.fromkeys(names, saved([torch.empty(0, dtype=torch.uint8)]))


def metadata(stored: Sequence[tuple[TensorSpec, Box, Item]], objects: Mapping[str, Item]) -> bytes:
    """Return `.metadata` for tensors cut into boxes, and for objects."""
    properties = {name: TensorProperties(dtype=dtype) for name, dtype in _DTYPES.items()}
    declared: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for spec, box, item in stored:
        entry = declared.setdefault(
            spec.name, TensorStorageMetadata(properties[spec.dtype], torch.Size(spec.shape), [])
        )
        assert isinstance(entry, TensorStorageMetadata)
        start = torch.Size(box.start)
        entry.chunks.append(ChunkStorageMetadata(start, torch.Size(box.extent)))
        storage[MetadataIndex(spec.name, start)] = _location(item)
    for name, item in objects.items():
        declared[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _location(item)
    content = Metadata(declared, planner_data=None, storage_data=storage)
    content.storage_meta = StorageMeta()
    if "version" in {field.name for field in fields(Metadata)}:
        content.version = _VERSION
    return pickle.dumps(content, protocol=_PROTOCOL)


def _location(item: Item) -> _StorageInfo:
    return _StorageInfo(item.file, item.offset, item.length)

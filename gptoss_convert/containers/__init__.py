"""Containers: how tensors lie in files. They know names, dtypes and offsets, never the model."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from gptoss_convert.containers.refs import Copied, Identity

DTYPE_BYTES: dict[str, int] = {
    "U8": 1,
    "BF16": 2,
    "F16": 2,
    "F32": 4,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
}
"""Item size of each dtype that a GPT-OSS weight, or what it is decoded from, may be stored in, by
its safetensors name."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor to store; `chunk_shape` is what a container that chunks tensors stores at once."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor that lies contiguous and row-major in one file; often the whole tensor."""

    tensor: str
    dtype: str
    shape: tuple[int, ...]
    """Shape of the whole tensor."""
    start: tuple[int, ...]
    """Index of the box's first element in the tensor."""
    extent: tuple[int, ...]
    """Shape of the box."""
    file: str
    """Path relative to the checkpoint directory, POSIX form."""
    offset: int
    """Byte offset of the box's first element in the file."""
    identity: Identity | None = field(default=None, compare=False, repr=False)
    """What the file was when this was read from it; None for one that is to be written."""
    packed: Packed | None = None
    """What the values are decoded from, for a quantised tensor. The chunk is then a whole tensor at
    offset 0 whose bytes are those of the decoded values, which are in no file."""

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return math.prod(self.extent) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True, slots=True)
class Packed:
    """A quantised tensor: the stored tensors that its values are decoded from, and the decoder."""

    decoder: str
    """Name of the module among the codecs' decoders."""
    members: tuple[tuple[str, Chunk], ...]
    """Each stored tensor, whole, by the decoder's name for it."""
    numbers: tuple[tuple[str, float], ...] = ()
    """What the decoder must know besides, by its names for them."""


@dataclass(frozen=True, slots=True)
class FileImage:
    """A file to be written: its final size, and the bytes known before any tensor is read."""

    name: str
    size: int
    fixed: tuple[tuple[int, bytes], ...] = ()
    """(offset, bytes): headers, zip records, objects. All else is chunk data or a hole."""


@dataclass(frozen=True, slots=True)
class Image:
    """A directory to be written, every offset decided before the first byte."""

    files: tuple[FileImage, ...]
    chunks: tuple[Chunk, ...]
    closing: tuple[tuple[str, Content], ...]
    """(name, content) of files written, in this order, after all tensor bytes are on disk."""


Content = bytes | Copied
"""A small file's content: known, or that of another file, which is read when it is written."""


def content_size(content: Content) -> int:
    """Bytes of a small file."""
    return len(content) if isinstance(content, bytes) else content.size

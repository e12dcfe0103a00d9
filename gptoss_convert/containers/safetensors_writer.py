"""Files of the safetensors container before they are written: order, header, image."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gptoss_convert.containers import Chunk, FileImage, Image, TensorSpec
from gptoss_convert.containers.safetensors import parse_header

PAGE = 4096
_DTYPE_ORDER = ("F32", "BF16", "F16", "U8")


def reference_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The order in which the reference library's `save_file` lays tensors out."""
    return sorted(specs, key=lambda spec: (_DTYPE_ORDER.index(spec.dtype), spec.name))


def aligned_order(specs: Iterable[TensorSpec]) -> list[TensorSpec]:
    """Whole pages first, so that every large tensor starts on a page; otherwise as given."""
    return sorted(specs, key=lambda spec: spec.nbytes % PAGE != 0)


def header_text(specs: Sequence[TensorSpec], metadata: Mapping[str, str], align: int) -> str:
    """The header for tensors laid out in this order, padded so that data starts at a multiple."""
    content: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs:
        content[spec.name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-(8 + len(text.encode())) % align)


def file_image(name: str, text: str) -> tuple[FileImage, tuple[Chunk, ...]]:
    """The image of one file from its header text, and its chunks."""
    raw = text.encode()
    header = parse_header(name, name, raw, None)
    fixed = ((0, struct.pack("<Q", len(raw)) + raw),)
    size = header.data_start + sum(chunk.nbytes for chunk in header.chunks)
    return FileImage(name, size, fixed), header.chunks


def image(headers: Mapping[str, str], index: tuple[str, bytes] | None, folder: str = "") -> Image:
    """A directory of shards from their header texts; the index, if any, is written last."""
    images = [file_image(folder + name, text) for name, text in headers.items()]
    return Image(
        tuple(file for file, _ in images),
        tuple(chunk for _, chunks in images for chunk in chunks),
        (index,) if index else (),
    )

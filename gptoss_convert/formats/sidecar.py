"""The sidecar of a BF16 checkpoint: the MXFP4 scales and the files it came from, for the way back.

BF16 holds every MXFP4 value exactly, but not which of several equal scales was stored. One byte per
block restores the bytes; `origin.json` keeps the headers, the index and config.json of the source.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk, Image, TensorSpec, safetensors, safetensors_writer
from gptoss_convert.containers.budget import RECORD
from gptoss_convert.containers.paths import lies, read_text, safe_name
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import IntegrityError
from gptoss_convert.layouts.table_files import load_table

FOLDER = "mxfp4-scales"
SCALES = "scales.safetensors"
ORIGIN = "origin.json"
SCHEMA = 1


@dataclass(frozen=True)
class Origin:
    """How the MXFP4 source was stored: enough to write its files again, byte for byte."""

    format: str
    headers: Mapping[str, str]
    """Header text by file name."""
    index: str | None
    config: str | None

    def to_json(self) -> bytes:
        """The content of origin.json."""
        content = {"schema": SCHEMA, **vars(self)}
        return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


@dataclass(frozen=True)
class Sidecar:
    """A sidecar found beside BF16 weights: chunks of the scales, relative to the checkpoint."""

    chunks: tuple[Chunk, ...]
    origin: Origin | None


def holds(name: str) -> bool:
    """Whether a file of a checkpoint is one of its sidecar's."""
    return name.startswith(f"{FOLDER}/")


def read(root: Path) -> Sidecar | None:
    """The sidecar in `root`, or None; raises InputError or IntegrityError if it is damaged."""
    if not lies(root, f"{FOLDER}/{SCALES}"):
        return None
    header = safetensors.read_header(root, f"{FOLDER}/{SCALES}")
    path = root / FOLDER / ORIGIN
    if not lies(root, f"{FOLDER}/{ORIGIN}"):
        return Sidecar(header.chunks, None)
    content = parse_object(str(path), read_text(root, f"{FOLDER}/{ORIGIN}", RECORD.nbytes))
    return Sidecar(header.chunks, _origin(path, content))


def _origin(path: Path, content: Mapping[str, Any]) -> Origin:
    if content.get("schema") != SCHEMA:
        raise IntegrityError(f"{path}: schema {content.get('schema')!r}, expects {SCHEMA}")
    headers = content.get("headers")
    texts = [content.get("index"), content.get("config")]
    if not isinstance(headers, dict) or any(not isinstance(t, str | None) for t in texts):
        raise IntegrityError(f"{path}: headers, index or config is missing or malformed")
    for name, text in headers.items():
        if not safe_name(name) or not name.endswith(".safetensors") or not isinstance(text, str):
            raise IntegrityError(f"{path}: file name {name!r} is not acceptable")
    for text in (*headers.values(), *texts):
        # JSON may escape half a character, which no file can hold.
        if text is not None and text != text.encode(errors="ignore").decode():
            raise IntegrityError(f"{path}: headers, index or config is not Unicode text")
    return Origin(str(content.get("format")), headers, texts[0], texts[1])


def image(sizes: Mapping[str, int], origin: Origin | None) -> Image:
    """The sidecar's files, to be written beside the weights."""
    specs = [
        TensorSpec(tensor.name, tensor.dtype, tensor.shape)
        for tensor in load_table("scales").tensors("scales", sizes)
    ]
    text = safetensors_writer.header_text(specs, {"format": "pt"}, safetensors_writer.PAGE)
    closing = ((f"{FOLDER}/{ORIGIN}", origin.to_json()),) if origin else ()
    scales = safetensors_writer.image({SCALES: text}, None, f"{FOLDER}/")
    return Image(scales.files, scales.chunks, closing)

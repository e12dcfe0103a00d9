"""Rounded experts on the disk, a file a layer, until TARGET is made of them.

Where every byte will lie is known beforehand, so that a conversion is planned as if the files were
there. A layer that is there is complete: a file gets its name when all of it is on the disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any, TypeAlias

from gptoss_convert.containers import TensorSpec, safetensors, safetensors_writer
from gptoss_convert.containers.budget import RECORD
from gptoss_convert.containers.paths import create_inside, open_inside, read_text
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import UsageError
from gptoss_convert.errors.refusals import disk_error
from gptoss_convert.layouts.extents import Extent, extents
from gptoss_convert.layouts.table_files import load_table
from gptoss_convert.layouts.tables import Tensor
from gptoss_convert.machine.private import make_marked, own_folder
from gptoss_convert.machine.small_files import sync_directory

Buffer: TypeAlias = bytes | memoryview
STATE = "calibration.json"


@dataclass(frozen=True)
class RoundedLayers:
    """The directory of a calibration's layers, for a model of these sizes."""

    root: Path
    sizes: Mapping[str, int]

    def extents(self) -> list[Extent]:
        """Where the blocks and scales of every expert lie, or will."""
        tensors = list(load_table("rounded").tensors("rounded", self.sizes))
        chunks = [
            chunk
            for layer in range(self.sizes["layer"])
            for chunk in safetensors_writer.file_image(_name(layer), self._header(tensors, layer))[
                1
            ]
        ]
        return extents(str(self.root), tensors, chunks, root=self.root)

    def begin(self, identity: Mapping[str, Any], restart: bool) -> None:
        """Make the directory, or take over one of the same identity.

        Raises UsageError that says what differs.
        """
        path = self.root / STATE
        now = json.loads(json.dumps(identity))
        if os.path.lexists(self.root) and own_folder(self.root) and path.exists() and not restart:
            then = parse_object(str(path), read_text(self.root, STATE, RECORD.nbytes))
            if then != now:
                key = next(k for k in sorted({*then, *now}) if then.get(k) != now.get(k))
                raise UsageError(
                    f"{self.root}: an unfinished calibration of another kind lies there ({key}: "
                    f"{then.get(key)!r:.80} then, {now.get(key)!r:.80} now); finish it with its "
                    "own options, or pass --restart to discard it"
                )
            return
        make_marked(self.root)
        self._write_whole(STATE, [(json.dumps(now, indent=1, sort_keys=True) + "\n").encode()])

    def done(self, layer: int) -> dict[str, Any] | None:
        """What was noted of a layer that is complete, None if it is not."""
        if not (self.root / _name(layer)).is_file():
            return None
        note = _note(layer)
        return parse_object(str(self.root / note), read_text(self.root, note, RECORD.nbytes))

    def write(
        self, layer: int, content: Mapping[str, Callable[[], Buffer]], note: Mapping[str, Any]
    ) -> None:
        """Store a layer's tensors, by name without the layer's prefix, and a note on it; each is
        asked for when it is written."""
        tensors = list(load_table("rounded").tensors("rounded", self.sizes))
        image, chunks = safetensors_writer.file_image(_name(layer), self._header(tensors, layer))

        def parts() -> Iterator[Buffer]:
            yield from (fixed for _, fixed in image.fixed)
            for chunk in sorted(chunks, key=lambda chunk: chunk.offset):
                part = memoryview(content[chunk.tensor.removeprefix(f"layers.{layer}.")]())
                if part.nbytes != chunk.nbytes:
                    raise ValueError(
                        f"{chunk.tensor}: {part.nbytes} bytes, expected {chunk.nbytes}"
                    )
                yield part

        self._write_whole(_note(layer), [json.dumps(note).encode()])
        self._write_whole(_name(layer), parts())

    def read(self, layer: int) -> dict[str, bytes]:
        """A layer's tensors, as `write` takes them."""
        header = safetensors.read_header(self.root, _name(layer))
        content: dict[str, bytes] = {}
        with open_inside(self.root, _name(layer)) as file:
            whole = BufferedReader(file)  # pyright: ignore[reportArgumentType]
            for chunk in header.chunks:
                whole.seek(chunk.offset)
                content[chunk.tensor.removeprefix(f"layers.{layer}.")] = whole.read(chunk.nbytes)
        return content

    def _header(self, tensors: list[Tensor], layer: int) -> str:
        specs = [
            TensorSpec(one.name, one.dtype, one.shape)
            for one in tensors
            if one.bound["layer"] == layer
        ]
        return safetensors_writer.header_text(specs, {}, safetensors_writer.PAGE)

    def _write_whole(self, name: str, parts: Iterable[Buffer]) -> None:
        """Write a file under another name, sync it, then give it its own."""
        path = self.root / f"{name}.new"
        try:
            descriptor = create_inside(self.root, path.name, os.O_WRONLY)
            with os.fdopen(descriptor, "wb") as file:
                file.truncate()
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            path.rename(self.root / name)
            sync_directory(self.root)
        except OSError as error:
            raise disk_error(str(path), error) from None


def _name(layer: int) -> str:
    return f"layer-{layer:05}.safetensors"


def _note(layer: int) -> str:
    return f"layer-{layer:05}.json"

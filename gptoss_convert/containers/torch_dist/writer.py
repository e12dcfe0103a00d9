"""Planning a torch_dist directory: every file, item and offset, before any data exists."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gptoss_convert.containers import Chunk, FileImage, Image, TensorSpec
from gptoss_convert.containers.torch_dist import serialized
from gptoss_convert.containers.torch_dist.item_form import ItemForm, item_form
from gptoss_convert.containers.torch_dist.metadata import ChunkBox, Item
from gptoss_convert.errors import UsageError

PAGE = 4096
"""The data of every item begins at a multiple of this, so that it can be written unbuffered."""

_BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json of core 0.18 and earlier, which refuse any other field; later ones ignore two."""


def image(
    specs: Sequence[TensorSpec],
    objects: Mapping[str, bytes],
    common: Mapping[str, object],
    *,
    files: int,
    max_file_bytes: int,
) -> Image:
    """Return the image of an iteration directory, the same bytes for the same input.

    Tensors lie in the order of `specs`, each cut into boxes of its `chunk_shape` (empty: whole;
    the last box of an axis may be smaller), spread over about `files` files of at most
    `max_file_bytes`; `objects` follow in a file of their own. Raises UsageError for a chunk that no
    file can hold.
    """
    boxes = [(spec, box, form) for spec, box, form in _boxes(specs)]
    goal = -(-sum(form.length + PAGE for _, _, form in boxes) // max(files, 1))
    placed = _Placed(max_file_bytes)
    tensor_items = [placed.tensor(spec, box, form, goal) for spec, box, form in boxes]
    placed.close_file()
    object_items = {name: placed.object(name, objects[name]) for name in objects}
    placed.close_file()
    stored = [(spec, box, item) for (spec, box, _), item in zip(boxes, tensor_items, strict=True)]
    closing = (
        ("common.pt", serialized.common(common)),
        (".metadata", serialized.metadata(stored, object_items)),
        # Last: its presence declares the checkpoint complete.
        ("metadata.json", json.dumps(_BACKENDS).encode()),
    )
    return Image(tuple(placed.files), tuple(placed.chunks), closing)


def _boxes(specs: Sequence[TensorSpec]) -> Iterator[tuple[TensorSpec, ChunkBox, ItemForm]]:
    forms: dict[tuple[str, tuple[int, ...]], ItemForm] = {}
    for spec in specs:
        steps = spec.chunk_shape or spec.shape
        if len(steps) != len(spec.shape) or 0 in steps:
            raise UsageError(f"{spec.name}: chunk shape {steps} does not tile {spec.shape}")
        axes = (range(0, dim, step) for dim, step in zip(spec.shape, steps, strict=True))
        for start in itertools.product(*axes):
            extent = tuple(
                min(step, dim - first)
                for first, dim, step in zip(start, spec.shape, steps, strict=True)
            )
            kind = (spec.dtype, extent)
            if kind not in forms:
                forms[kind] = item_form(*kind)
            yield spec, ChunkBox(start, extent), forms[kind]


@dataclass(slots=True)
class _Placed:
    """Items laid one after another. State: the files closed so far, and the open one."""

    max_file_bytes: int
    files: list[FileImage] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    fixed: list[tuple[int, bytes]] = field(default_factory=list)
    size: int = 0
    name: str = "__0_0.distcp"

    def close_file(self) -> None:
        if self.size:
            self.files.append(FileImage(self.name, self.size, tuple(self.fixed)))
            self.name = f"__0_{len(self.files)}.distcp"
        self.fixed, self.size = [], 0

    def tensor(self, spec: TensorSpec, box: ChunkBox, form: ItemForm, goal: int) -> Item:
        if self.size >= goal:
            self.close_file()
        data = self._aligned(form)
        if self.size and data + form.nbytes + len(form.suffix) > self.max_file_bytes:
            self.close_file()
            data = self._aligned(form)
        end = data + form.nbytes + len(form.suffix)
        if end > self.max_file_bytes:
            raise UsageError(
                f"{spec.name}: a chunk of {form.nbytes} bytes exceeds the limit of "
                f"{self.max_file_bytes} bytes per file"
            )
        start = data - len(form.prefix)
        self.fixed += ((start, form.prefix), (data + form.nbytes, form.suffix))
        self.chunks.append(
            Chunk(spec.name, spec.dtype, spec.shape, box.start, box.extent, self.name, data)
        )
        self.size = end
        return Item(self.name, start, form.length)

    def object(self, name: str, content: bytes) -> Item:
        if self.size and self.size + len(content) > self.max_file_bytes:
            self.close_file()
        if not 0 < len(content) <= self.max_file_bytes:
            raise UsageError(f"{name}: an object of {len(content)} bytes does not fit a file")
        item = Item(self.name, self.size, len(content))
        self.fixed.append((self.size, content))
        self.size += len(content)
        return item

    def _aligned(self, form: ItemForm) -> int:
        return -(-(self.size + len(form.prefix)) // PAGE) * PAGE

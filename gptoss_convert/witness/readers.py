"""Readers: the weights of a checkpoint as the model code of its ecosystem would take them.

Each reader is written by hand from that ecosystem's own arithmetic and shares nothing with the
mapping tables: where a table is wrong, two readers of the same model disagree.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, final

import torch
from torch import Tensor

from gptoss_convert.containers import Chunk, safetensors
from gptoss_convert.containers.paths import read_text
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.witness.fetch import ByteRange, Fetcher, ranges_of
from gptoss_convert.witness.model import LayerWeights, ModelConfig, fresh

SubBlock = Literal["attention", "router", "experts"]
"""The parts of a layer after which the residual stream can be observed."""

FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
BYTES = {"U8": torch.uint8}


class Reader(ABC):
    """A checkpoint as a model: read lazily, one layer at a time, onto one device.

    Whatever views a reader makes of what it read, what it hands out is fresh (`model.fresh`): this
    class alone sees to that.
    """

    config: ModelConfig
    """The numbers of the model."""

    @final
    def embedding(self) -> Tensor:
        """`[vocab, hidden]`."""
        return fresh(self._embedding())

    @final
    def layer(self, index: int) -> LayerWeights:
        """The weights of layer `index`, counted from 0."""
        held = dict(vars(self._layer(index)))
        for name in held:  # one by one: what was read goes as soon as its copies are made
            held[name] = fresh(held[name])
        return LayerWeights(**held)

    @final
    def norm(self) -> Tensor:
        """The final norm's weight, `[hidden]`."""
        return fresh(self._norm())

    @final
    def unembedding(self) -> Tensor:
        """`[vocab, hidden]`."""
        return fresh(self._unembedding())

    @abstractmethod
    def prepare(self, index: int) -> None:
        """Start to read layer `index`, or what follows the last one: the unembedding."""

    @abstractmethod
    def feeding(self, index: int, block: SubBlock) -> tuple[str, ...]:
        """Names, as stored, of the tensors that feed a sub-block of layer `index`."""

    @abstractmethod
    def _embedding(self) -> Tensor: ...

    @abstractmethod
    def _layer(self, index: int) -> LayerWeights: ...

    @abstractmethod
    def _norm(self) -> Tensor: ...

    @abstractmethod
    def _unembedding(self) -> Tensor: ...


class ChangedReader(Reader):
    """Another reader's model, but for what a subclass changes of it."""

    def __init__(self, reader: Reader, config: ModelConfig):
        self._reader = reader
        self.config = config

    def prepare(self, index: int) -> None:
        """Start to read layer `index`, or the unembedding."""
        last = index == len(self.config.sliding)  # of fewer layers, perhaps
        self._reader.prepare(len(self._reader.config.sliding) if last else index)

    def feeding(self, index: int, block: SubBlock) -> tuple[str, ...]:
        """Names, as stored, of the tensors that feed a sub-block of layer `index`."""
        return self._reader.feeding(index, block)

    def _embedding(self) -> Tensor:
        return self._reader.embedding()

    def _layer(self, index: int) -> LayerWeights:
        return self._reader.layer(index)

    def _norm(self) -> Tensor:
        return self._reader.norm()

    def _unembedding(self) -> Tensor:
        return self._reader.unembedding()


class StoredTensors:
    """The tensors of a checkpoint's files by name, read late, onto one device."""

    def __init__(
        self, directory: Path, chunks: Iterable[Chunk], fetcher: Fetcher, rounded: bool = False
    ):
        self._rounded = rounded
        self._directory = directory
        self._fetcher = fetcher
        self._chunks: dict[str, list[Chunk]] = {}
        self._by_index: dict[str, dict[int, list[Chunk]]] = {}
        for chunk in chunks:
            self._chunks.setdefault(chunk.tensor, []).append(chunk)

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name is stored."""
        return name in self._chunks

    def names(self) -> tuple[str, ...]:
        """The names of all tensors."""
        return tuple(self._chunks)

    def chunks(self, name: str) -> Sequence[Chunk]:
        """Where the parts of a tensor lie."""
        return self._chunks[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor; IntegrityError if it is missing."""
        if name not in self._chunks:
            raise IntegrityError(f"{name}: missing")
        return self._chunks[name][0].shape

    def ahead(self, start: str, prefix: tuple[int, ...] = ()) -> None:
        """Start to read all tensors whose names begin so, at the leading indices `prefix`."""
        names = [name for name in self._chunks if name.startswith(start)]
        self._fetcher.ahead([self._ranges(name, prefix) for name in names])

    def read(self, name: str, shape: tuple[int, ...], prefix: tuple[int, ...] = ()) -> Tensor:
        """A float tensor, or its part at the leading indices `prefix`, which must have `shape`.

        Raises InputError for another shape or dtype, IntegrityError if chunks leave a gap.
        """
        found = self._read(name, shape, prefix, FLOATS)
        return found.to(torch.bfloat16) if self._rounded else found

    def read_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A U8 tensor; raises as `read` does."""
        return self._read(name, shape, (), BYTES)

    def _read(
        self,
        name: str,
        shape: tuple[int, ...],
        prefix: tuple[int, ...],
        dtypes: dict[str, torch.dtype],
    ) -> Tensor:
        stored = self.shape(name)
        if len(stored) != len(prefix) + len(shape) or stored[len(prefix) :] != shape:
            expected = (*(["any"] * len(prefix)), *shape)
            raise InputError(f"{name}: expects shape {expected}, found {stored}")
        kind = self._chunks[name][0].dtype
        if kind not in dtypes:
            raise InputError(f"{name}: expects a dtype of {', '.join(dtypes)}, found {kind}")
        dtype, ranges = dtypes[kind], self._ranges(name, prefix)
        held = sum(one.nbytes for one in ranges) // dtype.itemsize
        if held != math.prod(shape):
            raise IntegrityError(
                f"{name}: expects {math.prod(shape)} elements at {prefix}, chunks hold {held}"
            )
        return self._fetcher.read(ranges).view(dtype).view(shape)

    def _ranges(self, name: str, prefix: tuple[int, ...]) -> tuple[ByteRange, ...]:
        whole = [(0, length) for length in self.shape(name)[len(prefix) :]]
        box = (*((index, index + 1) for index in prefix), *whole)
        return ranges_of(self._directory, self._holding(name, prefix), box)

    def _holding(self, name: str, prefix: tuple[int, ...]) -> Sequence[Chunk]:
        """The chunks of a tensor that may hold what lies at a prefix."""
        if not prefix:
            return self._chunks[name]
        # Of all layers' and experts' chunks a tensor may have thousands.
        if name not in self._by_index:
            found: dict[int, list[Chunk]] = {}
            for chunk in self._chunks[name]:
                for index in range(chunk.start[0], chunk.start[0] + chunk.extent[0]):
                    found.setdefault(index, []).append(chunk)
            self._by_index[name] = found
        return self._by_index[name].get(prefix[0], [])


def safetensors_chunks(directory: Path, names: Iterable[str]) -> list[Chunk]:
    """The tensors of several files; IntegrityError if one stands in two of them."""
    chunks: dict[str, Chunk] = {}
    for name in names:
        for chunk in safetensors.read_header(directory, name).chunks:
            if chunk.tensor in chunks:
                where = directory / name
                raise IntegrityError(f"{where}: {chunk.tensor} is stored in another file as well")
            chunks[chunk.tensor] = chunk
    return list(chunks.values())


def hf_files(directory: Path) -> list[str]:
    """The weight files of an HF directory: those of its index, or `model.safetensors`, or all."""
    index = directory / safetensors.INDEX
    if not index.exists():
        single = (directory / "model.safetensors").exists()
        every = sorted(path.name for path in directory.glob("*.safetensors"))
        return ["model.safetensors"] if single or not every else every
    try:
        text = read_text(directory, safetensors.INDEX, safetensors.MAX_HEADER)
        return sorted(set(json.loads(text)["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{index}: expects an object weight_map, found {error!r}") from error

"""Readers: the weights of a checkpoint as the model code of its ecosystem would take them.

Each reader is written by hand from that ecosystem's own arithmetic and shares nothing with the
mapping tables: where a table is wrong, two readers of the same model disagree.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.verify.model import LayerWeights, ModelConfig

SubBlock = Literal["attention", "router", "experts"]
"""The parts of a layer after which the residual stream can be observed."""

FLOATS = (torch.bfloat16, torch.float16, torch.float32)


class Reader(Protocol):
    """A checkpoint as a model: read lazily, one layer at a time, onto one device."""

    @property
    def config(self) -> ModelConfig:
        """The numbers of the model."""
        ...

    def embedding(self) -> Tensor:
        """`[vocab, hidden]`."""
        ...

    def layer(self, index: int) -> LayerWeights:
        """The weights of layer `index`, counted from 0."""
        ...

    def norm(self) -> Tensor:
        """The final norm's weight, `[hidden]`."""
        ...

    def unembedding(self) -> Tensor:
        """`[vocab, hidden]`."""
        ...

    def feeding(self, index: int, block: SubBlock) -> tuple[str, ...]:
        """Names, as stored, of the tensors that feed a sub-block of layer `index`."""
        ...


class SafetensorsFiles:
    """The tensors of several safetensors files by name; files stay open, tensors are read late."""

    def __init__(self, files: list[Path], device: torch.device):
        self._files = {}
        for path in files:
            try:
                opened = safe_open(path, framework="pt", device=str(device))
                names = list(opened.keys())
            except (SafetensorError, OSError) as error:
                raise IntegrityError(f"{path}: not a readable safetensors file: {error}") from error
            for name in names:
                if name in self._files:
                    raise IntegrityError(f"{path}: {name} is stored in another file as well")
                self._files[name] = opened

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A float tensor; raises if it is missing or has another shape or dtype."""
        return self._read(name, shape, FLOATS)

    def read_bytes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """A U8 tensor; raises if it is missing or has another shape or dtype."""
        return self._read(name, shape, (torch.uint8,))

    def _read(self, name: str, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> Tensor:
        if name not in self._files:
            raise IntegrityError(f"{name}: missing")
        tensor: Tensor = self._files[name].get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name}: expects shape {shape}, found {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            raise InputError(f"{name}: expects a dtype of {dtypes}, found {tensor.dtype}")
        return tensor


def hf_files(directory: Path) -> list[Path]:
    """The weight files of an HF directory: those of its index, or the one `model.safetensors`."""
    index = directory / "model.safetensors.index.json"
    if not index.exists():
        return [directory / "model.safetensors"]
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return [directory / name for name in sorted(set(weight_map.values()))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{index}: expects an object weight_map, found {error!r}") from error

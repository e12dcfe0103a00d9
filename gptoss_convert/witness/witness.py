"""Which reader and which oracle stand for a format: the WITNESS of the module of its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.readers import Reader

Sequences = Sequence[Sequence[int]]
Oracle = Callable[["Given", ModelConfig, Sequences, torch.device], list[Tensor] | str]
"""The logits that an ecosystem's own model gives, or why it cannot, in words."""


@dataclass(frozen=True)
class Given:
    """What a witness is given of a checkpoint: where it lies, and its own words, as found."""

    root: Path
    layers: int
    chunks: tuple[Chunk, ...]
    """Where the tensors lie, as found, for a container that its reader does not open by itself."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """The content of a config.json in Hugging Face's words."""
    words: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """What the ecosystem's own files say of the model, as found, each with its place."""
    overruled: bool = False
    """Whether config.json holds instead of what they say of the arithmetic."""
    glu_interleave: int | None = None
    """Rows of gate and up that alternate in expert fc1, where the user says so."""
    packed: bool | None = None
    """Whether the experts are MXFP4, whatever config.json says; None is as it says."""
    naming: str = ""
    """Which of the arrangements that its ecosystem's writers have, in the format's own word."""
    dressed: bool = False
    """Whether the files have other names, or no config.json: then `chunks` and `config` count."""
    rounded: bool = False
    """Whether float32 and float16 are read as the BF16 that they round to."""


@dataclass(frozen=True)
class Witness:
    """Who reads a format by its ecosystem's own arithmetic, and whose model can be asked."""

    reader: Callable[[Given, Fetcher], Reader]
    oracle: Oracle
    library: str | None = None
    """The package whose model the oracle runs, None where there is none."""


def witness_of(format: str) -> Witness:
    """The witness of a format; raises InputError where nobody has written one."""
    name = f"{__package__}.{format.replace('-', '_')}"
    if find_spec(name) is None:
        raise InputError(f"{format}: no reader for its logits; convert it, or use --level values")
    return import_module(name).WITNESS

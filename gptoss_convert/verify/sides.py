"""One side of a comparison: a checkpoint as the reader of its ecosystem sees it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gptoss_convert.errors import InputError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats.adapters.adapter import Adapter
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.witness.adapted import AdaptedReader
from gptoss_convert.witness.adapter_files import Asked
from gptoss_convert.witness.fetch import MAX_AHEAD, Fetcher
from gptoss_convert.witness.readers import ChangedReader, Reader
from gptoss_convert.witness.witness import Given, witness_of


def open_reader(checkpoint: Checkpoint, fetcher: Fetcher, layers: int | None) -> Reader:
    """The reader of a checkpoint that is open, with its adapter if it has one; of its first
    `layers` layers, if fewer."""
    if packed := next((c.packed for c in checkpoint.chunks if c.packed), None):
        raise InputError(
            f"{checkpoint.place}: quantised ({packed.decoder}), which no witness here reads; "
            "convert it, and verify what that gives (--level values compares both)"
        )
    reader = witness_of(checkpoint.format).reader(given(checkpoint), fetcher)
    if checkpoint.adapter is not None:
        reader = _adapted(reader, checkpoint.adapter, fetcher)
    if layers is None or layers >= len(reader.config.sliding):
        return reader
    return FewerLayers(reader, layers)


def ahead_bytes(max_memory: int | None, readers: int) -> int:
    """Bytes that each of so many readers may read ahead, `max_memory` for all of them together."""
    return (max_memory or 2 * MAX_AHEAD) // readers


def _adapted(base: Reader, adapter: Adapter, fetcher: Fetcher) -> Reader:
    """The base with the adapter by the witness's own formulas: it is told what the user said, and
    nothing that was found out here."""
    told = adapter.options
    asked = Asked(told.adapter_layout, told.adapter_down, told.adapter_scale)
    return AdaptedReader(base, adapter.root, asked, fetcher, told.adapter_arithmetic == "peft")


def given(checkpoint: Checkpoint) -> Given:
    """What its witness is given of a checkpoint: no table, no plan, no axis."""
    text = checkpoint.hf_config or configs.hf_json(checkpoint.config, None, mxfp4=False)
    layers = checkpoint.config.num_hidden_layers
    return Given(
        checkpoint.root,
        layers,
        checkpoint.chunks if checkpoint.as_stored is None else checkpoint.as_stored,
        json.loads(text),
        checkpoint.words,
        overruled=checkpoint.overruled,
        glu_interleave=checkpoint.glu_interleave,
        packed=checkpoint.encoding == "mxfp4",
        naming=checkpoint.variant,
        dressed=checkpoint.dressed,
        rounded=checkpoint.cast,
    )


class FewerLayers(ChangedReader):
    """A reader that ends after its first layers: the same head behind a shorter model."""

    def __init__(self, reader: Reader, layers: int):
        super().__init__(reader, replace(reader.config, sliding=reader.config.sliding[:layers]))


def tokenizer_of(*checkpoints: Checkpoint) -> Path | None:
    """The first tokenizer.json that lies beside one of the checkpoints."""
    carried = (path for one in checkpoints for path in one.carried)
    return next((path for path in carried if path.name == "tokenizer.json"), None)

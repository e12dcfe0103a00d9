"""One side of a comparison: a checkpoint as the reader of its ecosystem sees it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from gptoss_convert.formats import config as configs
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.witness.configs import Section, hf_config
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.megatron import MegatronReader
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.openai import OpenAiReader
from gptoss_convert.witness.readers import ChangedReader, Reader


def open_reader(checkpoint: Checkpoint, fetcher: Fetcher, layers: int | None) -> Reader:
    """The reader of a checkpoint that is open; of its first `layers` layers, if fewer."""
    reader = _reader(checkpoint, fetcher)
    if layers is None or layers >= len(reader.config.sliding):
        return reader
    return FewerLayers(reader, layers)


def _reader(checkpoint: Checkpoint, fetcher: Fetcher) -> Reader:
    root = checkpoint.root
    if checkpoint.format == "hf":
        return HfReader(root, fetcher.device, fetcher)
    if checkpoint.format == "openai":
        return OpenAiReader(root, fetcher.device, fetcher)
    return MegatronReader(root, checkpoint.chunks, numbers(checkpoint), fetcher.device, fetcher)


def numbers(checkpoint: Checkpoint) -> ModelConfig:
    """The model's numbers from the config.json it carries, or as one would be written for it."""
    text = checkpoint.hf_config or configs.hf_json(checkpoint.config, None, mxfp4=False)
    return hf_config(Section(json.loads(text), f"{checkpoint.root}: config.json"))


class FewerLayers(ChangedReader):
    """A reader that ends after its first layers: the same head behind a shorter model."""

    def __init__(self, reader: Reader, layers: int):
        super().__init__(reader, replace(reader.config, sliding=reader.config.sliding[:layers]))


def tokenizer_of(*checkpoints: Checkpoint) -> Path | None:
    """The first tokenizer.json that lies beside one of the checkpoints."""
    carried = (path for one in checkpoints for path in one.carried)
    return next((path for path in carried if path.name == "tokenizer.json"), None)

"""The vocabulary's two tensors, where config.json and they disagree: resized, or tied.

A trainer that adds tokens makes both longer, and the config.json at hand may be the base model's.
GPT-OSS is not tied; a model that a trainer has tied is the same function with the rows twice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats.checkpoint import read_config
from gptoss_convert.formats.config import Config
from gptoss_convert.layouts.tables import Table

_TIED = "tie_word_embeddings"


@dataclass(frozen=True)
class Configured:
    """A config.json as it is true of the tensors, and these with both ends of the vocabulary."""

    config: Config
    text: str
    content: Mapping[str, Any]
    chunks: tuple[Chunk, ...]
    notes: tuple[str, ...]


def configure(
    path: Path, tables: Sequence[Table], chunks: Sequence[Chunk], rows: int | None
) -> Configured:
    """Read a config.json for these chunks; `rows` of the vocabulary as --vocab-size asks.

    Raises UsageError where the tensors have other rows than asked, IntegrityError where the head
    is missing.
    """
    text, content = read_config(path.parent, path.name)
    notes: list[str] = []
    said = dict(content)
    embedding, head = _names(tables)
    stored = {c.tensor: c.shape[0] for c in chunks if c.tensor in {embedding, head} and c.shape}
    if content.get(_TIED) is True and head not in stored and embedding in stored:
        copies = [replace(c, tensor=head) for c in chunks if c.tensor == embedding]
        chunks = [*chunks, *copies]
        said[_TIED] = False
        notes.append(f"{path}: {_TIED}: the embedding is {head}, too; TARGET has it twice")
    elif embedding in stored and head not in stored:
        raise IntegrityError(
            f"{path.parent}: no {head}: a model without its head, or one that training tied; say "
            f"{_TIED}: true in config.json if it is the embedding"
        )
    found = set(stored.values())
    if rows is not None and rows != said.get("vocab_size"):
        if found - {rows}:
            raise UsageError(f"{path}: --vocab-size is {rows}, the tensors have {min(found)} rows")
        notes.append(f"{path}: vocab_size is {said.get('vocab_size')}: taken as {rows}, as asked")
        said["vocab_size"] = rows
    if content.get(_TIED) is True and head in stored:
        raise InputError(
            f"{path}: {_TIED} is True, and {head} is stored: GPT-OSS has False; say so if the head "
            "was trained, remove it if it is the embedding"
        )
    config = configs.from_hf(str(path), said)
    changed = said != content
    return Configured(
        config, json.dumps(said) if changed else text, said, tuple(chunks), tuple(notes)
    )


def require_rows(
    path: Path, config: Config, tables: Sequence[Table], wrong: Mapping[str, int]
) -> None:
    """Say what helps where of all tensors the embedding and the head alone have other shapes.

    `wrong` has the rows of each tensor of another shape than the configuration gives it. Raises
    InputError.
    """
    if wrong.keys() == {*_names(tables)} and len(rows := {*wrong.values()}) == 1:
        (count,) = rows
        raise InputError(
            f"{path}: vocab_size is {config.vocab_size}, the embedding and the head have {count} "
            f"rows: where training resized the vocabulary, pass --vocab-size {count}"
        )


def _names(tables: Sequence[Table]) -> tuple[str, str]:
    """What the tables call the embedding and the head."""
    rules = {rule.params: rule.name for rule in next(iter(tables[0].variants.values()))}
    return rules[("embedding.weight",)], rules[("unembedding.weight",)]

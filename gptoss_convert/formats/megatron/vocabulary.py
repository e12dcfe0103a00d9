"""The rows of the vocabulary, which Megatron pads to a multiple; not every save says how many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.megatron.stated import Stated

KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""The tensors that Megatron pads with rows to a multiple of its tensor-parallel size."""
RELEASED_ROWS = 201088
"""Rows of the released models' vocabulary: more than the tokenizer's, and no padding of it."""


def rows(stated: Stated, chunks: Sequence[Chunk], asked: int | None) -> int:
    """Rows of the vocabulary: as asked or stated, else as stored, if they cannot be padded.

    Raises UsageError where padding is possible, and for a size that the tensors do not have.
    """
    stored = max((c.shape[0] for c in chunks if c.tensor in KEYS), default=0)
    found = asked if asked is not None else stated.fields.get("vocab_size")
    if found is None and (stored % _multiple(stated) or stored == RELEASED_ROWS):
        found = stored
    if found is None:
        raise UsageError(
            f"{stated.where}: no vocabulary size, {stored} rows may hold padding; pass "
            f"--vocab-size (as released: {RELEASED_ROWS})"
        )
    if type(found) is not int or not 0 < found <= stored:
        raise UsageError(
            f"{stated.where}: vocab_size {found!r}, the checkpoint holds {stored} rows"
        )
    return found


def _multiple(stated: Stated) -> int:
    """What padding is a multiple of: of this number times tensor-parallel ranks, then or before."""
    number = stated.raw.get("make_vocab_size_divisible_by")
    return number if type(number) is int and number > 0 else 128


def check_rows(where: str, rows: int, asked: int | None) -> None:
    """Refuse --vocab-size where the configuration says otherwise."""
    if asked not in (None, rows):
        raise UsageError(f"{where}: vocab_size is {rows}, --vocab-size is {asked}; omit it")


def without_padding(chunks: Sequence[Chunk], vocab_size: int) -> tuple[tuple[Chunk, ...], int]:
    """The chunks with the vocabulary cut to its real rows, and how many rows were padding."""
    cut: list[Chunk] = []
    padding = 0
    for chunk in chunks:
        if chunk.tensor not in KEYS or chunk.shape[0] <= vocab_size:
            cut.append(chunk)
            continue
        padding = chunk.shape[0] - vocab_size
        kept = min(chunk.extent[0], vocab_size - chunk.start[0])
        if kept > 0:
            shape = (vocab_size, *chunk.shape[1:])
            cut.append(replace(chunk, shape=shape, extent=(kept, *chunk.extent[1:])))
    return tuple(cut), padding

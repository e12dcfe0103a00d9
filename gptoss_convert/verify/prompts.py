"""Prompts of one's own: token ids from a file, text through the checkpoint's tokenizer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.containers.budget import PROMPTS, TOKENIZER, json_parts
from gptoss_convert.containers.paths import read_text
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.machine.failures import absent, disk_error, is_panic
from gptoss_convert.verify.sides import tokenizer_of
from gptoss_convert.witness.parity_report import NextTokens
from gptoss_convert.witness.tokens import TokenSequence

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def own_sequences(
    tokens: Path | None, prompt: str | None, sides: Sequence[Checkpoint], vocab: int
) -> tuple[TokenSequence, ...]:
    """The sequences of `--prompt` and `--tokens`; raises InputError for ids beyond `vocab`."""
    found: list[TokenSequence] = []
    if prompt is not None:
        found.append(TokenSequence("prompt", _ids(prompt, sides), shown=True))
    if tokens is not None:
        found += _from_file(tokens, sides)
    for one in found:
        if not one.tokens or not 0 <= min(one.tokens) <= max(one.tokens) < vocab:
            raise InputError(f"{one.name}: expects ids from 0 to {vocab - 1}, at least one")
    return tuple(found)


def _from_file(path: Path, sides: Sequence[Checkpoint]) -> list[TokenSequence]:
    """JSON lines, each a list of ids or a string; anything else is one text."""
    try:
        with path.open("rb") as file:
            raw = file.read(PROMPTS.nbytes + 1)
        text = raw.decode("utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UsageError(f"{path}: {str(error.strerror).lower()}") from None
    except OSError as error:
        raise disk_error(path, error) from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: no text: not UTF-8 at byte {error.start}") from None
    if len(raw) > PROMPTS.nbytes:
        raise InputError(f"{path}: more than {PROMPTS.nbytes} bytes, which is too much to compute")
    if path.suffix not in {".json", ".jsonl"}:
        return [TokenSequence(path.name, _ids(text, sides))]
    PROMPTS.require(str(path), json_parts(text))
    found = [
        TokenSequence(f"{path.name}:{number}", _line(f"{path}:{number}", line, sides))
        for number, line in enumerate(text.splitlines(), 1)
        if line.strip()
    ]
    if not found:
        raise InputError(f"{path}: no line holds a prompt")
    return found


def _line(where: str, line: str, sides: Sequence[Checkpoint]) -> tuple[int, ...]:
    try:
        content = json.loads(line)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, str):
        return _ids(content, sides)
    if isinstance(content, list) and all(type(one) is int for one in content):
        return tuple(content)
    raise InputError(f"{where}: expects a list of token ids or a string, found {line[:40]!r}")


def _ids(text: str, sides: Sequence[Checkpoint]) -> tuple[int, ...]:
    return tuple(load_tokenizer(sides).encode(text, add_special_tokens=False).ids)


def load_tokenizer(sides: Iterable[Checkpoint]) -> Tokenizer:
    """The tokenizer beside a checkpoint; UsageError without one, or without the library."""
    path = tokenizer_of(*sides)
    if path is None:
        raise UsageError("text needs a tokenizer.json beside SOURCE or TARGET; pass token ids")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        needed = "text needs the tokenizers library (pip install tokenizers)"
        raise absent(needed, error) from None
    text = read_text(path.parent, path.name, TOKENIZER.nbytes)
    try:
        return Tokenizer.from_str(text)
    # The library raises nothing narrower.
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):
            raise InputError(f"{path}: no tokenizer: {error!s:.300}") from None
        raise


def shown_tokens(found: Iterable[NextTokens], *sides: Checkpoint) -> list[str]:
    """One line per rank: the token and its probability in SOURCE and in TARGET."""
    lines: list[str] = []
    for one in found:
        tokenizer = load_tokenizer(sides)
        for (a, p), (b, q) in zip(one.source, one.target, strict=True):
            ours, theirs = (f"{tokenizer.decode([token])!r}" for token in (a, b))
            lines.append(f"{p:7.4f} {ours:<16} {q:7.4f} {theirs}")
    return lines

"""What a server is asked: sequences on both sides of the window and of YaRN's original length."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import cycle, islice
from typing import TYPE_CHECKING

from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.served.answers import Answer, Question
from gptoss_convert.witness.tokens import CATEGORIES, WRITTEN, TokenSequence, sequence

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GO_ON = 8
"""Tokens that a server adds to a prompt: they come from its cache, one by one."""
SAMPLE = 96
"""Positions that are asked for where each takes a request."""
_END = "<|endoftext|>"
_NEAR = 8
"""Positions in a row of which one is expected to end with a whole character."""


@dataclass(frozen=True)
class Asked:
    """A question about a sequence, or about a beginning of it."""

    sequence: TokenSequence
    question: Question


def lengths(config: ModelConfig) -> tuple[int, int, int]:
    """Twice and eight times the window, and beyond YaRN's original length by four windows."""
    long = max(config.rope_original_length, 8 * config.window) + 4 * config.window
    return 2 * config.window, 8 * config.window, long


def token_sequences(config: ModelConfig) -> tuple[TokenSequence, ...]:
    """Every category short, three of middle length, two long; the long ones first."""
    short, middle, long = lengths(config)
    written, generated = CATEGORIES[0::2], CATEGORIES[1::2]
    chosen = [(one, long) for one in (written[0], generated[0])]
    chosen += [(one, middle) for one in (*written[1:], generated[1])]
    chosen += [(one, short) for one in CATEGORIES]
    return tuple(sequence(one, length, 0, config.vocab) for one, length in chosen)


def text_sequences(config: ModelConfig, tokenizer: Tokenizer) -> tuple[TokenSequence, ...]:
    """The written categories as SOURCE's tokenizer encodes them, cut where it gives them back."""
    found: list[TokenSequence] = []
    short, middle, long = lengths(config)
    for length, names in ((long, WRITTEN[:1]), (middle, WRITTEN), (short, WRITTEN)):
        for name in names:
            ids = _encoded(name, length, tokenizer)
            kept = next((n for n in range(length, 0, -1) if text_of(tokenizer, ids[:n])), 1)
            found.append(TokenSequence(f"{name}-{kept}-text", tuple(ids[:kept])))
    return tuple(found)


def _encoded(name: str, length: int, tokenizer: Tokenizer) -> list[int]:
    """At least `length` ids of a file's passages, all of them again when they are used up."""
    file = resources.files("gptoss_convert.witness").joinpath(f"texts/{name}.txt")
    passages = file.read_text(encoding="utf-8").removesuffix("\n").split(f"{_END}\n")
    ids: list[int] = []
    for passage in cycle(passages):
        if len(ids) >= length:
            return ids
        whole = f"{passage.removesuffix(_END)}{_END}"
        ids += tokenizer.encode(whole, add_special_tokens=False).ids
    return ids


def text_of(tokenizer: Tokenizer, ids: Sequence[int]) -> str | None:
    """The text that these ids are the encoding of; None if there is none."""
    text = tokenizer.decode(list(ids), skip_special_tokens=False)
    same = tokenizer.encode(text, add_special_tokens=False).ids == list(ids)
    return text if same else None


def whole(
    sequences: Iterable[TokenSequence], sample: int | None, tokenizer: Tokenizer | None
) -> list[Asked]:
    """Each sequence in one question, the first and others from the shortest on up to `sample`.

    With a tokenizer the questions are texts.
    """
    first, *others = sequences
    kept, room = [first], (sample or 1 << 60) - len(first.tokens)
    for one in sorted(others, key=lambda one: len(one.tokens)):
        if len(one.tokens) <= room:
            kept.append(one)
            room -= len(one.tokens)
    if tokenizer is None:
        return [Asked(one, Question(one.tokens, None, GO_ON)) for one in kept]
    texts = ((one, text_of(tokenizer, one.tokens)) for one in kept)
    return [Asked(one, Question(one.tokens, text, GO_ON)) for one, text in texts if text]


def beginnings(
    sequences: Sequence[TokenSequence],
    config: ModelConfig,
    sample: int | None,
    tokenizer: Tokenizer | None,
) -> list[Asked]:
    """A question for each of `sample` positions, as many in each range of positions.

    With a tokenizer the questions are texts. A sequence's questions grow, so that a server's
    cache serves.
    """
    borders = (config.window, config.rope_original_length)
    ranges: list[list[tuple[int, int]]] = [[], [], []]
    for n, one in enumerate(sequences):
        for position in range(len(one.tokens)):
            ranges[sum(position >= border for border in borders)].append((n, position))
    filled = [places for places in ranges if places]
    each = max(1, (sample or SAMPLE) // len(filled))
    chosen = {place for places in filled for place in _spread(places, each)}
    return list(_questions(sequences, sorted(chosen), tokenizer))


def _spread(places: Sequence[tuple[int, int]], count: int) -> Iterator[tuple[int, int]]:
    """So many places, evenly apart."""
    count = min(count, len(places))
    return (places[(2 * n + 1) * len(places) // (2 * count)] for n in range(count))


def _questions(
    sequences: Sequence[TokenSequence],
    places: Iterable[tuple[int, int]],
    tokenizer: Tokenizer | None,
) -> Iterator[Asked]:
    for n, position in places:
        one = sequences[n]
        if tokenizer is None:
            yield Asked(one, Question(one.tokens[: position + 1]))
            continue
        # Behind a part of a character there is no text; a few positions on there is.
        nearby = (one.tokens[:end] for end in range(position + 1, len(one.tokens) + 1))
        for tokens in islice(nearby, _NEAR):
            if (text := text_of(tokenizer, tokens)) is not None:
                yield Asked(one, Question(tokens, text))
                break


def joined(asked: Sequence[Asked], answers: Sequence[Answer]) -> list[tuple[str, Answer]]:
    """One answer by sequence: what was said about its beginnings belongs together."""
    found: dict[str, Answer] = {}
    for one, answer in zip(asked, answers, strict=True):
        name = one.sequence.name
        if name in found:
            # Beginnings grow, so the later one has the tokens of both.
            answer = Answer(
                answer.tokens, answer.prompt, (*found[name].predictions, *answer.predictions)
            )
        found[name] = answer
    return list(found.items())


def digest(answers: Iterable[tuple[str, Answer]]) -> str:
    """SHA-256 over names, tokens and asked positions, hexadecimal."""
    content = hashlib.sha256()
    for name, answer in answers:
        places = [one.position for one in answer.predictions]
        content.update(f"{name} {answer.tokens} {places}\n".encode())
    return content.hexdigest()

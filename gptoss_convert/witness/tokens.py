"""The fixed token set that checkpoints are compared on.

Half of the categories is written: text in many scripts, code, and chat in the harmony format
(texts/*.txt), as GPT-OSS's tokenizer encodes it (texts/ids.json), since no tokenizer travels with
the weights. The others are generated: Philox streams (Salmon et al. 2011) mapped to ids by integer
arithmetic alone, the same on every machine and numpy version. The lengths straddle the sliding
window and YaRN's original length of the model at hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import accumulate

import numpy as np

from gptoss_convert.witness.model import ModelConfig

_LONGEST_NEEDED = 1 << 15
"""A window or an original length beyond this is never reached by the prompts."""
_LONGEST_EXTRA = 1 << 9

Raw = np.ndarray[tuple[int], np.dtype[np.uint64]]


@dataclass(frozen=True)
class TokenSequence:
    """One prompt: `name` is category, length and round, e.g. `text-4097-0`."""

    name: str
    tokens: tuple[int, ...]
    shown: bool = False
    """Whether the report shows the most likely next tokens."""


def standard_lengths(config: ModelConfig) -> tuple[int, ...]:
    """Lengths around the window and YaRN's original length, up to the longest YaRN reaches.

    For the released models: 1, 2, 127-130, 256, 1024, 4095-4097, 8192, 32768, 131072.
    """
    window, original = config.window, config.rope_original_length
    around = {1, 2, window - 1, window, window + 1, window + 2, 2 * window, 8 * window}
    beyond = {original - 1, original, original + 1, 2 * original, 8 * original}
    beyond.add(int(original * max(config.rope_factor, 1)))
    return tuple(sorted(n for n in around | beyond if n >= 1))


def token_set(
    config: ModelConfig, longest: int, positions: int, sample: int | None = None
) -> tuple[TokenSequence, ...]:
    """Sequences of all standard lengths up to `longest`, in rounds until `positions` are reached.

    The first length beyond both the window and YaRN's original length is never left out, however
    small `longest` is, unless it is longer than any prompt need be. `sample` is about the most
    positions a small machine can take: then that length, and others from the shortest on while
    there is room.
    """
    original = max(config.rope_original_length, config.window)
    standard = [n for n in standard_lengths(config) if n <= max(longest, _LONGEST_NEEDED)]
    needed = min((n for n in standard if n > original), default=standard[-1])
    lengths = [n for n in standard if n <= longest or n == needed]
    if sample is not None:
        others = [n for n in lengths if n != needed]
        _, *totals = accumulate(others, initial=needed)
        kept = [n for n, total in zip(others, totals, strict=True) if total <= sample]
        lengths, positions = sorted([*kept, needed]), 0
    sequences: list[TokenSequence] = []
    total, turn = 0, 0
    while turn == 0 or total < positions:
        for index, length in enumerate(lengths):
            # Another category at each turn, so that every length meets all of them in time.
            category = CATEGORIES[(index + turn) % len(CATEGORIES)]
            sequences.append(sequence(category, length, turn, config.vocab))
            total += length
        turn += 1
    return tuple(sequences)


def batches(sequences: Sequence[TokenSequence]) -> list[tuple[TokenSequence, ...]]:
    """Sequences that are computed together: neighbours, up to an eighth of all positions.

    A longer sequence is alone. Only lengths decide, so that a batch, and with it the bits of its
    products, is the same on however many devices the batches are computed.
    """
    room = sum(len(one.tokens) for one in sequences) // 8
    found: list[list[TokenSequence]] = []
    held = room
    for one in sequences:
        if held + len(one.tokens) > room:
            found.append([])
            held = 0
        found[-1].append(one)
        held += len(one.tokens)
    return [tuple(batch) for batch in found]


def extra_set(config: ModelConfig, turn: int) -> tuple[TokenSequence, ...]:
    """Uniformly random sequences, other ones at each turn, to reach experts not yet hit."""
    length = min(2 * config.window, _LONGEST_EXTRA)
    return tuple(sequence("uniform", length, 1000 + 16 * turn + n, config.vocab) for n in range(16))


def sequence(category: str, length: int, turn: int, vocab: int) -> TokenSequence:
    """The sequence of one category, length and round."""
    seed = hashlib.sha256(f"{category} {length} {turn}".encode()).digest()[:16]
    key = int.from_bytes(seed, "little")
    cut = _generated if category in GENERATED else _written
    ids = cut(category, key, length, vocab)
    return TokenSequence(f"{category}-{length}-{turn}", tuple(int(token) for token in ids))


def passages(vocab: int) -> tuple[TokenSequence, ...]:
    """Every written passage once, whole: `text-passage-3`, the categories by turns."""
    found = [
        TokenSequence(f"{category}-passage-{n}", tuple(token % vocab for token in passage))
        for category in WRITTEN
        for n, passage in enumerate(_passages()[category])
    ]
    # By number first, so that whoever takes each n-th of them meets all categories.
    return tuple(sorted(found, key=lambda one: int(one.name.rpartition("-")[2])))


def digest(sequences: Sequence[TokenSequence]) -> str:
    """SHA-256 over names and ids, hexadecimal: two reports with one digest used the same tokens."""
    content = hashlib.sha256()
    for one in sequences:
        content.update(f"{one.name}\n".encode())
        content.update(np.array(one.tokens, dtype="<i4").tobytes())
    return content.hexdigest()


def _written(category: str, key: int, length: int, vocab: int) -> Raw:
    """Passages from the one that `key` chooses on, all of them again when they are used up.

    The ids are those of the released models; a smaller vocabulary takes them modulo its size.
    """
    passages = _passages()[category]
    first = key % len(passages)
    ids = [token for passage in passages[first:] + passages[:first] for token in passage]
    return np.resize(np.array(ids, dtype=np.uint64), length) % np.uint64(vocab)


@cache
def _passages() -> dict[str, list[list[int]]]:
    """The ids of each passage of each written category; a passage ends with <|endoftext|>."""
    file = resources.files("gptoss_convert.witness").joinpath("texts/ids.json")
    texts = json.loads(file.read_text(encoding="utf-8"))
    return {category: texts[category]["passages"] for category in WRITTEN}


def _generated(category: str, key: int, length: int, vocab: int) -> Raw:
    # Two numbers per token: `random_raw` is the stream itself, which numpy keeps stable.
    raw = np.random.Philox(key=key).random_raw(2 * length)
    return GENERATED[category](raw[:length], raw[length:], vocab)


def _uniform(first: Raw, second: Raw, vocab: int) -> Raw:
    """Every id equally likely."""
    return first % np.uint64(vocab)


def _periodic(first: Raw, second: Raw, vocab: int) -> Raw:
    """A passage of 97 tokens over and over: attention finds its copies, near and far."""
    return np.resize(_uniform(first, second, vocab)[:97], len(first))


def _runs(first: Raw, second: Raw, vocab: int) -> Raw:
    """Runs of one id, 32 long on average: nothing but the position tells its tokens apart."""
    starts = second % np.uint64(32) == 0
    return _uniform(first, second, vocab)[
        np.maximum.accumulate(np.where(starts, np.arange(len(first)), 0))
    ]


WRITTEN = ("text", "code", "chat")
GENERATED: dict[str, Callable[[Raw, Raw, int], Raw]] = {
    "uniform": _uniform,
    "periodic": _periodic,
    "runs": _runs,
}
"""Each maps two raw 64-bit numbers per token to ids."""
CATEGORIES = tuple(name for pair in zip(WRITTEN, GENERATED, strict=True) for name in pair)
"""What sequences are made of, by turns written and generated."""

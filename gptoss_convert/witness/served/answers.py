"""What servers say about a sequence, whatever protocol they speak, and what is no answer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from gptoss_convert.errors import InputError
from gptoss_convert.witness.served.connection import Connection, Room

_MOST_PROBABILITY = 1.02
"""What probabilities of some tokens may add up to, with the rounding of a server's numbers."""


class UnsupportedError(InputError):
    """The server does not give log probabilities in this way; the message says what it answered."""


@dataclass(frozen=True)
class Prediction:
    """What a server expects after a position."""

    position: int
    """The last token it has seen, counted from 0 in the sequence."""
    logprobs: Mapping[int, float]
    """Natural logarithms of the probabilities of some next tokens, by id."""
    likeliest_told: bool = True
    """Whether the most likely token is surely among them."""


@dataclass(frozen=True)
class Answer:
    """What a server said about one sequence."""

    tokens: tuple[int, ...]
    """The prompt, and the tokens that the server went on with."""
    prompt: int
    """How many of them are the prompt."""
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True)
class Question:
    """A prompt, as token ids and, for servers that take nothing else, as text."""

    tokens: tuple[int, ...]
    text: str | None = None
    go_on: int = 1
    """Tokens that the server is to add, by the most likely one each time."""


class ServerProtocol(Protocol):
    """A way to ask one server."""

    @property
    def name(self) -> str:
        """What is asked for, in words."""
        ...

    @property
    def takes_text(self) -> bool:
        """Whether prompts are texts, which the server makes into tokens by its own tokenizer."""
        ...

    @property
    def scores_prompts(self) -> bool:
        """Whether one request gives log probabilities at every position of a prompt."""
        ...

    @property
    def top(self) -> int:
        """How many of the most likely tokens are asked for at each position."""
        ...

    def ask(self, question: Question) -> Answer:
        """The answer to a question.

        Raises NetworkError; UnsupportedError if the server cannot be asked so; InputError if it
        answers about other tokens or with what are no log probabilities.
        """
        ...


def logprobs_of(where: str, pairs: Iterable[tuple[Any, Any]], vocab: int) -> dict[int, float]:
    """Checked log probabilities by token id; InputError for anything that cannot be some."""
    found: dict[int, float] = {}
    for token, value in pairs:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
            raise InputError(
                f"{where}: expects token ids from 0 to {vocab - 1}, found {kind_of(token)}: "
                "another model's vocabulary?"
            )
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{where}: expects a log probability, found {kind_of(value)}")
        # A little more than 0 is rounding; JSON's 1e999 is infinite.
        if not -math.inf < value <= 1e-3:
            raise InputError(f"{where}: expects log probabilities up to 0, found {value:g}")
        found[token] = min(float(value), 0.0)
    if math.fsum(map(math.exp, found.values())) > _MOST_PROBABILITY:
        raise InputError(
            f"{where}: probabilities of {len(found)} tokens add up to more than 1: not those of "
            "a softmax"
        )
    return found


def require_count(where: str, what: str, found: object, expected: int) -> None:
    """InputError unless a server took as many tokens as the prompt has."""
    if isinstance(found, bool) or not isinstance(found, int):
        raise InputError(f"{where}: expects a number of {what}, found {kind_of(found)}")
    if found < expected:
        raise InputError(
            f"{where}: answered about {found} of {expected} {what}: the context is cut off, or "
            "the tokenizer is another one than SOURCE's; pass a smaller --max-length"
        )
    if found > expected:
        raise InputError(
            f"{where}: answered about {found} {what}, asked about {expected}: the server adds "
            "tokens, or its tokenizer is another one than SOURCE's"
        )


def kind_of(value: object) -> str:
    """What a JSON value is. Its content is the server's, and might repeat the key."""
    kinds = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return kinds.get(type(value), "nothing" if value is None else "another number")


def accepted(
    connection: Connection, path: str, request: Mapping[str, Any], room: Room
) -> tuple[str, Mapping[str, Any]]:
    """Where was asked, and the answer; UnsupportedError if the request is refused."""
    where = f"{connection.address}{path}"
    reply = connection.post(path, request, room)
    if reply.status < 400:
        return where, reply.content
    given = (reply.content[key] for key in ("error", "message", "detail") if key in reply.content)
    told = next(given, "")
    if isinstance(told, dict):
        told = told.get("message", "")
    said = f": {connection.shown(told)}" if isinstance(told, str) and told else ""
    raise UnsupportedError(f"{where}: answered {reply.status}{said}")


def items(where: str, value: object, count: int | None = None) -> list[Any]:
    """A JSON list, of so many items if `count` says; UnsupportedError if it is none."""
    if not isinstance(value, list):
        raise UnsupportedError(f"{where}: gives no log probabilities")
    if count is not None and len(value) != count:
        require_count(where, "tokens", len(value), count)
    return value

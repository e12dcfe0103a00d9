"""`/v1/completions`: vLLM's prompt_logprobs, OpenAI's echo, and log probabilities of one token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from gptoss_convert.errors import InputError
from gptoss_convert.witness.served.answers import (
    Answer,
    Prediction,
    Question,
    UnsupportedError,
    accepted,
    items,
    kind_of,
    logprobs_of,
    require_count,
)
from gptoss_convert.witness.served.connection import Connection, Room
from gptoss_convert.witness.served.words import Words

PATH = "/v1/completions"
Style = Literal["prompt_logprobs", "echo", "next", "next listed"]
"""How to ask: vLLM's own way; OpenAI's; for the next token alone; the same in chat's words."""
STYLES: tuple[Style, ...] = ("prompt_logprobs", "echo", "next", "next listed")
_FIELDS: Mapping[Style, Mapping[str, Any]] = {
    "prompt_logprobs": {
        "return_tokens_as_token_ids": True,
        "ignore_eos": True,
        "add_special_tokens": False,
    },
    "echo": {"echo": True},
    "next": {},
    "next listed": {"logprobs": True},
}


@dataclass(frozen=True)
class Completions:
    """One way of asking for completions; prompts are token ids, or texts."""

    connection: Connection
    model: str | None
    words: Words
    vocab: int
    style: Style
    takes_text: bool
    top: int

    @property
    def name(self) -> str:
        """The endpoint and the way."""
        way = {"prompt_logprobs": "prompt_logprobs", "echo": "echo and logprobs"}
        form = "text" if self.takes_text else "token ids"
        return f"{PATH}, {way.get(self.style, 'logprobs of the next token')}, prompts as {form}"

    @property
    def scores_prompts(self) -> bool:
        """Whether the whole prompt is scored at once."""
        return self.style in ("prompt_logprobs", "echo")

    def ask(self, question: Question) -> Answer:
        """One completion; see ServerProtocol."""
        room = Room.of(len(question.tokens) + question.go_on, self.top)
        where, content = accepted(self.connection, PATH, self._request(question), room)
        choices = items(where, content.get("choices"))
        if not choices or not isinstance(choices[0], dict):
            raise UnsupportedError(f"{where}: gives no choices")
        if isinstance(usage := content.get("usage"), dict) and "prompt_tokens" in usage:
            require_count(where, "prompt tokens", usage["prompt_tokens"], len(question.tokens))
        return self._parsed(where, choices[0], question)

    def _request(self, question: Question) -> dict[str, Any]:
        prompt = question.text if self.takes_text else list(question.tokens)
        asked = {"prompt_logprobs": self.top, "logprobs": self.top}
        if self.style == "next listed":
            asked = {"top_logprobs": self.top}
        elif self.style != "prompt_logprobs":
            del asked["prompt_logprobs"]
        return {
            **({"model": self.model} if self.model is not None else {}),
            "prompt": prompt,
            "max_tokens": question.go_on if self.scores_prompts else 1,
            "temperature": 0,
            "stream": False,
            **_FIELDS[self.style],
            **asked,
        }

    def _parsed(self, where: str, choice: Mapping[str, Any], question: Question) -> Answer:
        tokens, count = question.tokens, len(question.tokens)
        said = list(self._tokens(where, choice.get("logprobs")))
        scored: list[Prediction] = []
        if self.style == "prompt_logprobs":
            scored = self._prompt(where, choice.get("prompt_logprobs"), tokens)
        elif self.style == "echo" and said:
            if len(said) < count:
                require_count(where, "tokens", len(said), count)
            scored = self._echoed(where, said[:count], tokens)
            said = said[count:]
        elif not said:
            raise UnsupportedError(f"{where}: gives no log probabilities")
        else:
            said = said[:1]
        new = list(self._went_on(where, said, count))
        if self.scores_prompts:
            tokens += tuple(token for token, _ in new if token is not None)
        return Answer(tokens, count, (*scored, *(one for _, one in new)))

    def _prompt(self, where: str, found: object, tokens: Sequence[int]) -> list[Prediction]:
        """vLLM's list: an object by token id for each token of the prompt but the first."""
        listed = items(where, found, len(tokens))
        predictions: list[Prediction] = []
        for place, (token, entry) in enumerate(zip(tokens[1:], listed[1:], strict=True)):
            if not isinstance(entry, dict):
                raise InputError(f"{where}: gives no log probabilities of token {place + 1}")
            pairs = (
                (number(key), value.get("logprob") if isinstance(value, dict) else None)
                for key, value in entry.items()
            )
            logprobs = logprobs_of(where, pairs, self.vocab)
            if token not in logprobs:
                raise InputError(
                    f"{where}: token {place + 1} of the prompt is {token}, the server answers "
                    "about others"
                )
            predictions.append(Prediction(place, logprobs))
        return predictions

    def _echoed(self, where: str, said: Sequence[_Said], tokens: Sequence[int]) -> list[Prediction]:
        """The prompt's tokens come back, each with its log probability but the first."""
        predictions: list[Prediction] = []
        for place, (token, one) in enumerate(zip(tokens, said, strict=True)):
            if one.token is not None and one.token != token:
                raise InputError(
                    f"{where}: token {place} of the prompt is {token}, comes back as {one.token}: "
                    "the tokenizer is another one than SOURCE's"
                )
            if place:
                pairs = [*one.top, (token, one.logprob)]
                logprobs = logprobs_of(where, pairs, self.vocab)
                predictions.append(Prediction(place - 1, logprobs, one.all_known))
        return predictions

    def _went_on(
        self, where: str, said: Sequence[_Said], count: int
    ) -> Iterator[tuple[int | None, Prediction]]:
        """What was added, as far as the ids of its tokens are known."""
        for place, one in enumerate(said, count - 1):
            pairs = list(one.top)
            if one.token is not None and one.logprob is not None:
                pairs.append((one.token, one.logprob))
            logprobs = logprobs_of(where, pairs, self.vocab)
            yield one.token, Prediction(place, logprobs, one.all_known)
            if one.token is None:
                return

    def _tokens(self, where: str, found: object) -> Iterator[_Said]:
        """Each token that a choice reports, in either of the two forms of `logprobs`."""
        if not isinstance(found, dict):
            return
        if "content" in found:
            for entry in items(where, found["content"]):
                if not isinstance(entry, dict):
                    raise InputError(f"{where}: expects an object a token, found {kind_of(entry)}")
                # mlx-lm calls any of the most likely ones the token: which it is, these tell.
                listed = items(where, entry.get("top_logprobs"))
                pairs = self._listed(where, listed)
                yield _Said(None, None, pairs, len(pairs) == len(listed))
            return
        texts = items(where, found.get("tokens"))
        values = items(where, found.get("token_logprobs"), len(texts))
        tops = found.get("top_logprobs") or [None] * len(texts)
        for text, value, top in zip(texts, values, items(where, tops, len(texts)), strict=True):
            if not isinstance(top, dict | None):
                raise InputError(f"{where}: expects objects in top_logprobs, found {kind_of(top)}")
            known = [(self.words.token(key), value) for key, value in (top or {}).items()]
            pairs = tuple((token, one) for token, one in known if token is not None)
            yield _Said(self.words.token(text), value, pairs, len(pairs) == len(known))

    def _listed(self, where: str, found: list[Any]) -> tuple[tuple[int, Any], ...]:
        """Entries with an id or a text; texts that name no single token are left to the rest."""
        pairs: list[tuple[int, Any]] = []
        for entry in found:
            if not isinstance(entry, dict):
                raise InputError(f"{where}: expects an object a token, found {kind_of(entry)}")
            token = entry["id"] if "id" in entry else self.words.token(entry.get("token"))
            if token is not None:
                pairs.append((token, entry.get("logprob")))
        return tuple(pairs)


@dataclass(frozen=True)
class _Said:
    """A token of an answer: its id if known, its log probability, the most likely ones at its
    place."""

    token: int | None
    logprob: Any
    top: tuple[tuple[int, Any], ...]
    all_known: bool
    """Whether none was left out because its text names no single token."""


def number(key: str) -> int:
    """A token id that is the key of an object; -1, which is none, if it is no number."""
    return int(key) if key.isascii() and key.isdigit() and len(key) < 10 else -1

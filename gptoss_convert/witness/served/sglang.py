"""SGLang's `/generate` with `return_logprob`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

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

PATH = "/generate"


@dataclass(frozen=True)
class SGLang:
    """Token ids in, log probabilities of every token out, prompt and continuation apart."""

    connection: Connection
    vocab: int
    top: int
    name: str = f"{PATH} of SGLang, return_logprob"
    takes_text: bool = False
    scores_prompts: bool = True

    def ask(self, question: Question) -> Answer:
        """One generation; see ServerProtocol."""
        tokens = question.tokens
        request = {
            "input_ids": list(tokens),
            "sampling_params": {
                "max_new_tokens": question.go_on,
                "temperature": 0,
                "ignore_eos": True,
            },
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": self.top,
        }
        room = Room.of(len(tokens) + question.go_on, self.top)
        where, content = accepted(self.connection, PATH, request, room)
        found = content.get("meta_info")
        if not isinstance(found, dict):
            raise UnsupportedError(f"{where}: gives no meta_info")
        if "prompt_tokens" in found:
            require_count(where, "prompt tokens", found["prompt_tokens"], len(tokens))
        scored = list(self._positions(where, found, "input"))
        require_count(where, "tokens", len(scored), len(tokens))
        back = [token for token, _ in scored]
        if back != list(tokens):
            pairs = enumerate(zip(back, tokens, strict=True))
            place = next(place for place, (one, sent) in pairs if one != sent)
            raise InputError(
                f"{where}: token {place} of the prompt is {tokens[place]}, comes back as another"
            )
        new = list(self._positions(where, found, "output"))
        predictions = [
            Prediction(place, logprobs_of(where, pairs, self.vocab))
            for place, (_, pairs) in enumerate([*scored, *new][1:])
        ]
        return Answer((*tokens, *(token for token, _ in new)), len(tokens), tuple(predictions))

    def _positions(
        self, where: str, found: dict[str, Any], side: str
    ) -> Iterator[tuple[int, list[tuple[Any, Any]]]]:
        """Each token of the prompt or of what follows, with log probabilities at its place."""
        chosen = items(where, found.get(f"{side}_token_logprobs"))
        # Without the most likely ones the token itself remains.
        tops = found.get(f"{side}_top_logprobs") or [None] * len(chosen)
        for one, top in zip(chosen, items(where, tops, len(chosen)), strict=True):
            value, token = _pair(where, one)
            if isinstance(token, bool) or not isinstance(token, int):
                raise InputError(f"{where}: expects a token id, found {kind_of(token)}")
            pairs = [_pair(where, entry)[::-1] for entry in (items(where, top) if top else ())]
            yield token, [*pairs, (token, value)]


def _pair(where: str, entry: object) -> tuple[Any, Any]:
    """Log probability and token id, the first two of an entry."""
    if not isinstance(entry, list) or len(entry) < 2:
        raise InputError(
            f"{where}: expects [log probability, token id, ...], found {kind_of(entry)}"
        )
    return entry[0], entry[1]

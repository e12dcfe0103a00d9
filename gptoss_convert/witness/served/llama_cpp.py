"""`/completion` of llama.cpp's server, which gives log probabilities of new tokens only."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_convert.errors import InputError
from gptoss_convert.witness.served.answers import (
    Answer,
    Prediction,
    Question,
    UnsupportedError,
    accepted,
    items,
    logprobs_of,
    require_count,
)
from gptoss_convert.witness.served.connection import Connection, Room

PATH = "/completion"
_HALF = "\N{REPLACEMENT CHARACTER}"
"""A token that is no whole character: the server keeps it back, and its probabilities with it."""


@dataclass(frozen=True)
class LlamaCpp:
    """Token ids in, the most likely next tokens out."""

    connection: Connection
    vocab: int
    top: int
    name: str = f"{PATH} of llama.cpp, n_probs of the next token"
    takes_text: bool = False
    scores_prompts: bool = False

    def ask(self, question: Question) -> Answer:
        """One new token; see ServerProtocol."""
        tokens = question.tokens
        request = {
            "prompt": list(tokens),
            "n_predict": 1,
            "n_probs": self.top,
            "temperature": 0,
            # Else a prompt that ends the conversation has an answer without any token.
            "ignore_eos": True,
            "cache_prompt": True,
            "post_sampling_probs": False,
        }
        where, found = accepted(self.connection, PATH, request, Room.of(1, self.top))
        if found.get("truncated"):
            raise InputError(f"{where}: cut off a prompt of {len(tokens)} tokens")
        if "tokens_evaluated" in found:
            require_count(where, "tokens", found["tokens_evaluated"], len(tokens))
        if "completion_probabilities" not in found and found.get("content") == _HALF:
            return Answer(tokens, len(tokens), ())
        entries = items(where, found.get("completion_probabilities"))
        if not entries or not isinstance(entries[0], dict):
            raise UnsupportedError(f"{where}: gives no log probabilities")
        pairs = [
            (entry.get("id"), entry.get("logprob")) if isinstance(entry, dict) else (None, None)
            for entry in items(where, entries[0].get("top_logprobs"))
        ]
        logprobs = logprobs_of(where, pairs, self.vocab)
        return Answer(tokens, len(tokens), (Prediction(len(tokens) - 1, logprobs),))

"""Token ids of what servers call a token: by its number, or by its text in SOURCE's tokenizer."""

from __future__ import annotations

import re
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NUMBERED = re.compile(r"token_id:(\d{1,9})")


class Words:
    """What texts of single tokens stand for; without a tokenizer, numbered ones alone."""

    def __init__(self, tokenizer: Tokenizer | None):
        self.tokenizer = tokenizer

    def token(self, text: object) -> int | None:
        """The id; None for a text that no token has, or more than one."""
        if not isinstance(text, str):
            return None
        if match := _NUMBERED.fullmatch(text):
            return int(match[1])
        return self._by_text.get(text)

    @cached_property
    def _by_text(self) -> dict[str, int | None]:
        if self.tokenizer is None:
            return {}
        found: dict[str, int | None] = {}
        for token in sorted(self.tokenizer.get_vocab().values()):
            text = self.tokenizer.decode([token], skip_special_tokens=False)
            # Halves of a character all read alike.
            found[text] = token if text not in found else None
        return found

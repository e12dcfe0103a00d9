"""Texts that leave as files: without secrets, in UTF-8 whatever names they repeat."""

from __future__ import annotations

import re
from pathlib import Path

from gptoss_convert.errors.secrets import scrub

_NOT_IN_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def write_text(path: Path, text: str) -> None:
    """Write a text for people or programs; half a character, of a name that is no UTF-8, is shown
    as its number. Raises OSError.
    """
    path.write_text(scrub(text), encoding="utf-8", errors="backslashreplace")


def in_xml(text: str) -> str:
    """The text with what XML cannot hold, not even escaped, as Python writes it."""
    return _NOT_IN_XML.sub(lambda found: repr(found[0])[1:-1], text)

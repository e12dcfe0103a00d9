"""What may go to a terminal, and what a terminal can show."""

from __future__ import annotations

import os


def is_dumb() -> bool:
    """Whether TERM names a terminal that understands no control sequences."""
    return os.environ.get("TERM") in ("dumb", "unknown")


def printable(text: str) -> str:
    """One line that no name from an untrusted file can break or colour."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)

"""Which SOURCE is a repository on the Hub, and which a directory."""

from __future__ import annotations

import os
import re
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlsplit

from gptoss_convert.errors import UsageError
from gptoss_convert.formats.repository import Repository

RELEASED = (
    "openai/gpt-oss-20b",
    "openai/gpt-oss-120b",
    "openai/gpt-oss-safeguard-20b",
    "openai/gpt-oss-safeguard-120b",
)
_ID = re.compile(r"(?!.*(?:--|\.\.))[a-z0-9][\w.-]*/[a-z0-9_][\w.-]*", re.ASCII | re.IGNORECASE)
_REVISION = re.compile(r"(?![./-])(?!.*(?:\.\.|//|/\.))[^\s\x00-\x1f\x7f\\:?*\[^~]{1,255}(?<![./])")
"""What git takes for the name of a branch, tag or commit; in the cache it is a file's."""
_SCHEME = "hf://"
_PAGE = re.compile(r"https?://[^/]+/([^/?#]+/[^/?#]+)")
"""A repository's page, as a browser shows its address."""


def repository(source: str | Path, revision: str | None = None) -> Repository | None:
    """The repository that SOURCE names, None where it is a directory.

    An existing path always wins, and a `Path` is one. Raises UsageError where the two could be
    mixed up, with the way to say which is meant.
    """
    if isinstance(source, str) and source.startswith(_SCHEME):
        name, _, at = source.removeprefix(_SCHEME).partition("@")
        if not _ID.fullmatch(name) or (at and revision):
            raise UsageError(f"{source}: expects hf://owner/name, or hf://owner/name@revision")
        return _at(name, at or revision)
    if isinstance(source, str) and not Path(source).exists() and _ID.fullmatch(source):
        owner = source.partition("/")[0]
        if Path(owner).exists():
            raise UsageError(
                f"{source}: no such directory in {owner}; for the repository write hf://{source}"
            )
        return _at(source, revision)
    if isinstance(source, str) and (page := _PAGE.match(source)):
        raise UsageError(f"{source}: an address; for the repository write {page[1]}")
    if meant := _released(str(source)):
        raise UsageError(f"{source}: no such directory; did you mean {meant}, on the Hub?")
    if revision is not None:
        raise UsageError(f"--revision {revision}: {source} is not a repository on the Hub")
    return None


def _at(name: str, revision: str | None) -> Repository:
    if revision is not None and not _REVISION.fullmatch(revision):
        raise UsageError(f"{name}: revision {revision!r:.80} is no branch, tag or commit")
    return Repository(name, revision)


def require_endpoint() -> None:
    """Raise UsageError for an HF_ENDPOINT that is no address: the client would fail while it is
    imported, and show a part of it, which may be of a password."""
    address = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    try:
        parts = urlsplit(address)
        fine = parts.scheme in {"http", "https"} and parts.hostname and parts.port != 0
    except ValueError:
        fine = False
    if not fine:
        raise UsageError("HF_ENDPOINT: expects https://HOST or https://HOST:PORT")


def _released(source: str) -> str | None:
    """The released model that a name without its owner stands for, if no such path exists."""
    names = {name.partition("/")[2]: name for name in RELEASED}
    return None if Path(source).exists() else names.get(source.lower())


def similar(name: str) -> str:
    """`; did you mean ...?`, where a released repository has nearly this name."""
    plain = name.lower().replace("_", "-")
    found = get_close_matches(plain, RELEASED, 1, cutoff=0.9)
    return f"; did you mean {found[0]}?" if found and found[0] != name else ""

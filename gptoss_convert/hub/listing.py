"""What the Hub lists of a repository, checked before anything of it is used."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptoss_convert.errors import IntegrityError, NetworkError
from gptoss_convert.formats.repository import Repository

COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MOST_FILES = 100_000
_LARGEST = 1 << 42
"""Bytes of a file; a larger one, of which nothing is read, some file systems cannot have."""
_LONGEST = 1024
"""Characters of a path."""
_PIECE = 1 << 20
_LFS, _GIT = "SHA-256", "git's SHA-1"


@dataclass(frozen=True)
class Listing:
    """The files of a repository at one commit."""

    repository: Repository
    """With its commit."""
    files: Mapping[str, int]
    """Size by path."""
    cached_only: bool = False
    """Whether HF_HUB_OFFLINE is set: then these are the files that the cache holds."""
    digests: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """By path, where the Hub states one: which digest, and what it must be in hexadecimal."""


_seen: dict[tuple[str, str | None, str], tuple[int, str]] = {}
"""By repository, commit and path: how long a beginning was read, and the SHA-256 of it."""
_listings: dict[tuple[str, str | None], Listing] = {}


def listed(repository: Repository, content: Mapping[str, Any], endpoint: str) -> Listing:
    """The listing in the Hub's description of a revision; raises NetworkError for anything odd, and
    where the same commit was listed otherwise before.
    """
    commit, siblings = content.get("sha"), content.get("siblings")
    if not isinstance(commit, str) or not COMMIT.fullmatch(commit) or not siblings:
        raise _no_list(repository, endpoint)
    asked = repository.commit or repository.revision
    if asked and COMMIT.fullmatch(asked) and commit != asked:
        raise NetworkError(f"{repository}: asked for commit {asked}, {endpoint} answered {commit}")
    if not isinstance(siblings, list) or len(siblings) > _MOST_FILES:
        raise _no_list(repository, endpoint)
    files: dict[str, int] = {}
    digests: dict[str, tuple[str, str]] = {}
    for entry in siblings:
        name, size, digest = _entry(repository, entry, endpoint)
        if name in files:
            raise NetworkError(f"{repository}: {endpoint} lists {name!r:.80} twice")
        files[name] = size
        if digest:
            digests[name] = digest
    found = Listing(replace(repository, commit=commit), files, digests=digests)
    before = _listings.setdefault((repository.name, commit), found)
    if (before.files, before.digests) != (files, digests):
        raise NetworkError(f"{repository}: {endpoint} lists other files of {commit} than before")
    return found


def _no_list(repository: Repository, endpoint: str) -> NetworkError:
    return NetworkError(
        f"{repository}: {endpoint} answered with no list of files; does HF_ENDPOINT lead to a Hub?"
    )


def _entry(
    repository: Repository, entry: Any, endpoint: str
) -> tuple[str, int, tuple[str, str] | None]:
    """Path, size and digest of a file."""
    entry = entry if isinstance(entry, dict) else {}
    name, size, blob, lfs = (entry.get(key) for key in ("rfilename", "size", "blobId", "lfs"))
    if not isinstance(name, str) or not 0 < len(name) <= _LONGEST:
        raise _no_list(repository, endpoint)
    if type(size) is not int or not 0 <= size < _LARGEST:
        raise _no_list(repository, endpoint)
    stated = lfs.get("sha256") if isinstance(lfs, dict) else blob
    form, which = (_SHA256, _LFS) if lfs is not None else (COMMIT, _GIT)
    if stated is None:
        return name, size, None
    if not isinstance(stated, str) or not form.fullmatch(stated):
        raise NetworkError(f"{repository}/{name:.80}: {endpoint} states {which} {stated!r:.80}")
    return name, size, (which, stated)


def remember_beginning(listing: Listing, path: str, content: bytes) -> None:
    """Hold what was read of a file against its digest if that is all of it, and against what is
    downloaded later if not; raises IntegrityError."""
    if len(content) == listing.files[path]:
        _require(listing, path, _digest(listing, path, [content]))
    key = (listing.repository.name, listing.repository.commit, path)
    length, _ = _seen.get(key, (0, ""))
    if len(content) >= length:
        _seen[key] = len(content), hashlib.sha256(content).hexdigest()


def require_same_beginning(listing: Listing, path: str, file: Path) -> None:
    """Raise IntegrityError unless a file begins with what was read of it when it was planned."""
    length, expected = _seen.get(
        (listing.repository.name, listing.repository.commit, path), (0, "")
    )
    with file.open("rb") as opened:
        found = hashlib.sha256(opened.read(length)).hexdigest()
    if length and found != expected:
        raise IntegrityError(
            f"{listing.repository}/{path}: begins otherwise than what was planned with; the server "
            "or the cache changed: run the same command again"
        )


def require_digest(listing: Listing, path: str, file: Path) -> None:
    """Raise IntegrityError unless a downloaded file has the size and digest that are listed."""
    with file.open("rb") as opened:
        pieces = iter(lambda: opened.read(_PIECE), b"")
        _require(listing, path, _digest(listing, path, pieces))


def _digest(listing: Listing, path: str, pieces: Any) -> str:
    """The digest of the kind that is listed of a file."""
    which, _ = listing.digests.get(path, ("", ""))
    if not which:
        return ""
    digest = hashlib.sha256() if which == _LFS else hashlib.sha1(usedforsecurity=False)
    if which == _GIT:
        digest.update(b"blob %d\0" % listing.files[path])
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _require(listing: Listing, path: str, found: str) -> None:
    which, stated = listing.digests.get(path, ("", ""))
    if found != stated:
        raise IntegrityError(
            f"{listing.repository}/{path}: {which} is {found}, the Hub lists {stated}: damaged on "
            "the way, or not what it says; run the same command again"
        )

"""Which files were read for a plan, and what they were: it is made of one state of all of them.

A checkpoint is many files that say one thing together. If they are exchanged while they are read,
each may be whole and the plan still a mixture; so what was read first is looked at again last.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path

from gptoss_convert.containers.refs import FileRef, Identity
from gptoss_convert.errors import IntegrityError

Seen = dict[FileRef, FileRef]
"""Files with what they were, by themselves."""
_seen: ContextVar[Seen | None] = ContextVar("seen", default=None)


@contextmanager
def remembering() -> Iterator[Seen]:
    """The files that this thread opens meanwhile, as they were when it opened them first."""
    seen: Seen = {}
    token = _seen.set(seen)
    try:
        yield seen
    finally:
        _seen.reset(token)


@contextmanager
def forgetting() -> Iterator[None]:
    """What is opened meanwhile may change later: it decided only what was opened next."""
    token = _seen.set(None)
    try:
        yield
    finally:
        _seen.reset(token)


def remember(root: Path, name: str, descriptor: int) -> None:
    """Note an open file; raises IntegrityError if it was another, or in another state, before."""
    seen = _seen.get()
    if seen is None:
        return
    found = FileRef(root, name, Identity.of(descriptor))
    if seen.setdefault(found, found).identity != found.identity:
        raise changed(found)


def changed(file: FileRef) -> IntegrityError:
    """The error for a file that is not the one that was read before."""
    return IntegrityError(
        f"{file}: changed since its header was read: another file, or written to; "
        "run the command again when nothing changes it"
    )

"""Publishing: TARGET is written under a hidden name beside its place and appears all at once."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.errors import DiskError, GptossError, ResourceError, TargetError, UsageError
from gptoss_convert.files import sync_directory

_KEPT = (DiskError, ResourceError)
"""Errors after which the same command can go on; any other says that the work is of no use."""


def check_target(source: Path, target: Path) -> None:
    """Refuse a TARGET that lies in SOURCE or holds it, or has no writable parent."""
    parent = target.parent.resolve()
    if not parent.is_dir():
        raise UsageError(f"{target}: its parent directory does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DiskError(f"{target}: its parent directory is not writable")
    inner, outer = parent / target.name, source.resolve()
    if inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner.resolve()):
        raise UsageError(f"{target}: SOURCE and TARGET lie in each other")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target}: exists and is not a directory")


def check_absent(target: Path) -> None:
    """Refuse a TARGET that holds anything."""
    if target.exists() and any(target.iterdir()):
        raise TargetError(f"{target}: exists; pass --overwrite to replace it when all is written")


@dataclass(frozen=True)
class Workspace:
    """Where TARGET is made: a hidden directory, and the journal beside it, held by a lock."""

    work: Path
    journal: int
    """Descriptor of the journal, open for reading and writing."""


@contextmanager
def workspace(target: Path, restart: bool) -> Iterator[Workspace]:
    """A hidden directory beside TARGET that becomes TARGET when the block ends without an error.

    What an interrupted run left is kept for the next one. A second writer gets TargetError.
    """
    work = target.parent / f".{target.name}.gptoss-convert"
    path = target.parent / f".{target.name}.gptoss-convert.journal"
    with _locked(path, target) as descriptor:
        if restart:
            shutil.rmtree(work, ignore_errors=True)
            os.ftruncate(descriptor, 0)
        try:
            work.mkdir(exist_ok=True)
            yield Workspace(work, descriptor)
            _swap(work, target)
        except GptossError as error:
            if not isinstance(error, _KEPT):
                shutil.rmtree(work, ignore_errors=True)
                path.unlink(missing_ok=True)
            raise
        path.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[int]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held = path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())
        except BlockingIOError:
            held = False
        if not held:
            raise TargetError(f"{target}: another process is writing it")
        yield descriptor
    finally:
        os.close(descriptor)


def _swap(work: Path, target: Path) -> None:
    """Rename last: whoever sees TARGET may rely on every file in it."""
    for folder, _, _ in os.walk(work):
        sync_directory(Path(folder))
    old = target.parent / f".{target.name}.gptoss-convert.old"
    if target.exists():
        target.rename(old)
    work.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)

"""Publishing: TARGET is written under a hidden name beside its place and appears all at once."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoss_convert.errors import DiskError, TargetError, UsageError
from gptoss_convert.files import sync_directory


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    """Refuse a TARGET that exists, lies in SOURCE or holds it, or has no writable parent."""
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
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise TargetError(f"{target}: exists; pass --overwrite to replace it when all is written")


@contextmanager
def workspace(target: Path, overwrite: bool) -> Iterator[Path]:
    """A hidden directory beside TARGET that becomes TARGET when the block ends without an error.

    A second writer of the same TARGET gets TargetError.
    """
    work = target.parent / f".{target.name}.gptoss-convert"
    lock = target.parent / f".{target.name}.gptoss-convert.lock"
    with _locked(lock, target):
        if work.exists():
            shutil.rmtree(work)
        work.mkdir()
        try:
            yield work
            _swap(work, target, overwrite)
        except BaseException:
            shutil.rmtree(work, ignore_errors=True)
            raise


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise TargetError(f"{target}: another process is writing it") from None
        yield
        path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _swap(work: Path, target: Path, overwrite: bool) -> None:
    """Rename last: whoever sees TARGET may rely on every file in it."""
    for folder, _, _ in os.walk(work):
        sync_directory(Path(folder))
    old = target.parent / f".{target.name}.gptoss-convert.old"
    if target.exists():
        if overwrite:
            target.rename(old)
        else:
            target.rmdir()
    work.rename(target)
    sync_directory(target.parent)
    shutil.rmtree(old, ignore_errors=True)

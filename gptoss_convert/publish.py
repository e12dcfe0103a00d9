"""Publishing: TARGET is written under a hidden name beside its place and appears all at once."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.errors import (
    CodecError,
    DiskError,
    InputError,
    IntegrityError,
    TargetError,
    UsageError,
)
from gptoss_convert.files import sync_directory
from gptoss_convert.hub.names import Repository

_USELESS = (CodecError, InputError, IntegrityError)
"""Errors after which the work is of no use; after any other the same command can go on."""
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def check_target(source: Path | Repository, target: Path) -> None:
    """Refuse a TARGET that lies in SOURCE or holds it, or has no writable parent."""
    parent = target.parent.resolve()
    if not parent.is_dir():
        raise UsageError(f"{target}: its parent directory does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DiskError(f"{target}: its parent directory is not writable")
    if target.name in {"", ".."}:
        raise UsageError(f"{target}: TARGET needs a name of its own")
    if isinstance(source, Path) and _nested(parent / target.name, source.resolve()):
        raise UsageError(f"{target}: SOURCE and TARGET lie in each other")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target}: exists and is not a directory")


def _nested(inner: Path, outer: Path) -> bool:
    return inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner.resolve())


def check_absent(target: Path) -> None:
    """Refuse a TARGET that holds anything."""
    if target.exists() and any(target.iterdir()):
        raise TargetError(f"{target}: exists; pass --overwrite to replace it when all is written")


@dataclass(frozen=True)
class Workspace:
    """Where TARGET is made: a hidden directory, and the journal beside it, held by a lock."""

    target: Path
    work: Path
    old: Path
    """Where a TARGET that is replaced goes first."""
    path: Path
    """The journal."""
    journal: int
    """Its descriptor, open for reading and writing."""
    fresh: bool
    """Whether no interrupted run left anything."""

    def open(self) -> None:
        """Make the hidden directory, or take what an interrupted run left of it."""
        if self.work.is_symlink() or (self.work.exists() and not self.work.is_dir()):
            raise TargetError(f"{self.work}: not a directory of an interrupted run; remove it")
        try:
            self.work.mkdir(exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.work}: {error.strerror}") from None

    def discard(self) -> None:
        """Remove what was made, and the journal with it."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.path.unlink(missing_ok=True)

    def publish(self) -> None:
        """Rename last: whoever sees TARGET may rely on every file in it."""
        for folder, _, _ in os.walk(self.work):
            sync_directory(Path(folder))
        sync_directory(self.target.parent)
        try:
            if self.target.exists():
                shutil.rmtree(self.old, ignore_errors=True)
                self.target.rename(self.old)
            self.work.rename(self.target)
        except OSError as error:
            raise DiskError(f"{self.target}: cannot be renamed: {error.strerror}") from None
        self.finish()

    def finish(self) -> None:
        """Remove what is left beside a TARGET that has been renamed."""
        sync_directory(self.target.parent)
        shutil.rmtree(self.old, ignore_errors=True)
        self.path.unlink(missing_ok=True)


@contextmanager
def workspace(target: Path, restart: bool) -> Iterator[Workspace]:
    """The place beside TARGET where it is made; a second writer gets TargetError.

    What an interrupted run left is kept for the next one, unless the error says that it is useless.
    """
    hidden = f".{target.name}.gptoss-convert"
    path = target.parent / f"{hidden}.journal"
    with _locked(path, target) as descriptor:
        work, old = target.parent / hidden, target.parent / f"{hidden}.old"
        if restart:
            shutil.rmtree(work, ignore_errors=True)
            os.ftruncate(descriptor, 0)
        fresh = os.fstat(descriptor).st_size == 0 and not work.exists()
        space = Workspace(target, work, old, path, descriptor, fresh)
        try:
            yield space
        except _USELESS:
            space.discard()
            raise
        except (UsageError, TargetError):
            if fresh:
                space.discard()
            raise


@contextmanager
def _locked(path: Path, target: Path) -> Iterator[int]:
    try:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(path, flags, 0o644)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    try:
        if not _lock(descriptor, path):
            raise TargetError(f"{target}: another process is writing it")
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int, path: Path) -> bool:
    """Whether this process holds the journal alone, and it still lies at its path."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise DiskError(f"{path}: cannot be locked: {error.strerror}") from None
        raise DiskError(
            f"{path}: the file system knows no locks; convert to a local disk, then copy"
        ) from None
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())

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

from gptoss_convert.containers.paths import settled
from gptoss_convert.errors import (
    DiskError,
    GptossError,
    InputError,
    IntegrityError,
    TargetError,
    UsageError,
)
from gptoss_convert.formats.repository import Repository
from gptoss_convert.machine.files import sync_directory

_USELESS = {InputError.exit_code, IntegrityError.exit_code}
"""Statuses after which the work is of no use; after any other the same command can go on."""
_REFUSED = {UsageError.exit_code, TargetError.exit_code}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_EXCHANGE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_HERE, _EXCHANGE = -100, 2
"""Of renameat2: paths as the process sees them, and RENAME_EXCHANGE."""


def check_target(source: Path | Repository, target: Path) -> Path:
    """TARGET, the links on the way to it resolved.

    Refuses one that lies in SOURCE or holds it, or has no writable parent.
    """
    parent = settled(target.parent)
    if not parent.is_dir():
        raise UsageError(f"{target}: its parent directory does not exist")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise DiskError(f"{target}: its parent directory is not writable")
    if target.name in {"", ".."}:
        raise UsageError(f"{target}: TARGET needs a name of its own")
    if isinstance(source, Path) and _nested(parent.resolve() / target.name, source.resolve()):
        raise UsageError(f"{target}: SOURCE and TARGET lie in each other")
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise TargetError(f"{target}: exists and is not a directory")
    return parent / target.name


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
    """Where a TARGET that is replaced goes first, if the two cannot be exchanged in one step."""
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
            self.work.mkdir(0o755, exist_ok=True)
        except OSError as error:
            raise DiskError(f"{self.work}: {error.strerror}") from None
        if link := next((path for path in self.work.rglob("*") if path.is_symlink()), None):
            raise TargetError(f"{link}: a link, which no conversion makes; remove it")

    def other_ranks(self) -> list[int]:
        """The ranks from 1 on whose journals lie beside this one."""
        begin = f"{self.path.name}."
        names = (path.name for path in self.path.parent.iterdir())
        ends = (name.removeprefix(begin) for name in names if name.startswith(begin))
        return sorted(int(end) for end in ends if end.isdecimal() and end.isascii())

    def discard(self) -> None:
        """Remove what was made, and the journals with it."""
        shutil.rmtree(self.work, ignore_errors=True)
        shutil.rmtree(rounded_path(self.target), ignore_errors=True)
        self._remove_journals()

    def _remove_journals(self) -> None:
        # The one that holds the lock goes last: it says whose the others are.
        for rank in (*self.other_ranks(), 0):
            journal_path(self.target, rank).unlink(missing_ok=True)

    def publish(self) -> None:
        """Rename last: whoever sees TARGET may rely on every file in it."""
        for folder, _, _ in os.walk(self.work):
            sync_directory(Path(folder))
        sync_directory(self.target.parent)
        try:
            if not self.target.exists():
                self.work.rename(self.target)
            elif not _exchange(self.work, self.target):
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
        self.discard()


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step, so that neither is ever missing; False where unknown."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error not in _NO_EXCHANGE:
        raise OSError(error, os.strerror(error))
    return False


@contextmanager
def workspace(target: Path, restart: bool) -> Iterator[Workspace]:
    """The place beside TARGET where it is made; a second writer gets TargetError.

    What an interrupted run left is kept for the next one, unless the error says that it is useless.
    """
    path, work = journal_path(target), work_path(target)
    with locked_journal(target) as descriptor:
        old = work.with_name(f"{work.name}.old")
        fresh = restart or (os.fstat(descriptor).st_size == 0 and not work.exists())
        space = Workspace(target, work, old, path, descriptor, fresh)
        if restart:
            for rank in space.other_ranks():
                with locked_journal(target, rank) as other:
                    os.ftruncate(other, 0)
            shutil.rmtree(work, ignore_errors=True)
            os.ftruncate(descriptor, 0)
        try:
            yield space
        except GptossError as error:
            if error.exit_code in _USELESS or (fresh and error.exit_code in _REFUSED):
                space.discard()
            raise


def work_path(target: Path) -> Path:
    """The hidden directory that TARGET is written in."""
    return target.parent / f".{target.name}.gptoss-convert"


def shards_path(target: Path) -> Path:
    """The hidden directory that holds a repository's shards while they are converted."""
    return target.parent / f"{work_path(target).name}.shards"


def rounded_path(target: Path) -> Path:
    """Where a calibration puts rounded experts until TARGET is made of them."""
    return work_path(target).with_name(f"{work_path(target).name}.rounded")


def journal_path(target: Path, rank: int = 0) -> Path:
    """The journal of one of the ranks that write TARGET; a run alone is rank 0."""
    name = f"{work_path(target).name}.journal"
    return target.parent / (f"{name}.{rank}" if rank else name)


@contextmanager
def locked_journal(target: Path, rank: int = 0) -> Iterator[int]:
    """A rank's journal, open and locked; TargetError if another process holds it."""
    path = journal_path(target, rank)
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

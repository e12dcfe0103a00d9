"""TARGET: where it may lie, and the hidden names beside it while it is made."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from gptoss_convert.containers.paths import create_inside, settled
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import DiskError, TargetError, UsageError
from gptoss_convert.formats.repository import Repository
from gptoss_convert.machine.private import require_own

_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


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
    if target.is_symlink():
        raise TargetError(
            f"{target}: a link, which would be replaced; name what it leads to: "
            f"{os.path.realpath(target)}"
        )
    if target.exists() and not target.is_dir():
        raise TargetError(f"{target}: exists and is not a directory")
    found = parent / target.name
    if isinstance(source, Path):
        check_input("SOURCE", source, found)
    return found


def check_input(name: str, path: Path, target: Path) -> None:
    """Refuse what is to be read from where TARGET is made, or from a TARGET that is replaced."""
    place, parent = path.resolve(), target.parent.resolve()
    hidden = work_path(target).name
    for inside in (place, *place.parents):
        if inside.parent == parent and inside.name.startswith(hidden):
            raise UsageError(f"{path}: {name} lies in the hidden directory of {target}")
    if place.is_relative_to(parent / target.name):
        raise UsageError(f"{path}: {name} and TARGET lie in each other")


def check_reads(files: Iterable[FileRef], target: Path) -> None:
    """Refuse to replace a TARGET that files lie in which are read, by whatever links."""
    if not target.exists():
        return
    inside = f"{os.path.realpath(target)}/"
    for file in files:
        if os.path.realpath(file.path).startswith(inside):
            raise UsageError(f"{file}: lies in TARGET, which is replaced; name another TARGET")


def _nested(inner: Path, outer: Path) -> bool:
    return inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner.resolve())


def check_absent(target: Path) -> None:
    """Refuse a TARGET that holds anything."""
    if target.exists() and any(target.iterdir()):
        raise TargetError(f"{target}: exists; pass --overwrite to replace it when all is written")


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
        descriptor = create_inside(path.parent, path.name, os.O_RDWR)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    try:
        require_own(path, os.fstat(descriptor))
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

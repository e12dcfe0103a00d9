"""Publishing: TARGET is written under a hidden name beside its place and appears all at once."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from gptoss_convert.containers.paths import create_inside, settled
from gptoss_convert.containers.walk import LinkError, folder
from gptoss_convert.conversion.journal import marked
from gptoss_convert.errors import (
    DiskError,
    GptossError,
    InputError,
    IntegrityError,
    TargetError,
    UsageError,
)
from gptoss_convert.formats.repository import Repository
from gptoss_convert.machine.private import (
    list_folder,
    make_folder,
    make_marked,
    own_folder,
    remove_folder,
    remove_marked,
    require_own,
)
from gptoss_convert.machine.small_files import sync_directory

_USELESS = {InputError.exit_code, IntegrityError.exit_code}
"""Statuses after which the unfinished work is useless; after any other it can be resumed."""
_REFUSED = {UsageError.exit_code, TargetError.exit_code}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NO_EXCHANGE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2."""


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


def _nested(inner: Path, outer: Path) -> bool:
    return inner == outer or inner.is_relative_to(outer) or outer.is_relative_to(inner.resolve())


def check_absent(target: Path) -> None:
    """Refuse a TARGET that holds anything."""
    if target.exists() and any(target.iterdir()):
        raise TargetError(f"{target}: exists; pass --overwrite to replace it when all is written")


class ForeignError(TargetError):
    """Something lies in the hidden directory that no conversion put there."""


@dataclass
class Workspace:
    """Where TARGET is made: a hidden directory, and the journal beside it, held by a lock."""

    target: Path
    names: Set[str]
    """All that TARGET will hold, and the hidden directory with it."""
    journal: int
    """The journal's descriptor, open for reading and writing."""
    fresh: bool
    """Whether no interrupted run left anything."""
    inode: int | None
    """Of the hidden directory, which the journal speaks of."""

    @property
    def work(self) -> Path:
        """The hidden directory."""
        return work_path(self.target)

    @property
    def old(self) -> Path:
        """Where a TARGET that was replaced goes."""
        return self.work.with_name(f"{self.work.name}.old")

    def open(self, replaced: int | None = None) -> int:
        """Make the hidden directory, or take what an interrupted run left of it; its inode.

        Raises TargetError for one that the journal does not speak of, or with more in it, and for
        what is left of a TARGET, other than the one that was being `replaced`.
        """
        if os.path.lexists(self.old) and self.old.lstat().st_ino != replaced:
            raise TargetError(f"{self.old}: what is left of a TARGET that was replaced; remove it")
        if make_folder(self.work):
            self.inode = own_folder(self.work).st_ino
            return self.inode
        found = own_folder(self.work).st_ino
        # A run that was killed right after making it left it empty.
        if found != self.inode and list_folder(self.work):
            raise TargetError(
                f"{self.work}: not the directory of an interrupted run: its journal does not "
                "speak of it; move it away"
            )
        self.inode = found
        self.require_exact()
        return self.inode

    def require_replaceable(self) -> None:
        """Refuse a TARGET that no other can take the place of; raises TargetError.

        It is renamed over a directory that is not empty: where that alone stands in the way, it can
        be moved, and nothing has happened.
        """
        if not os.path.lexists(self.target):
            return
        if inner := _mount_below(self.target):
            raise TargetError(f"{self.target}: {inner} in it is a mount point; unmount it first")
        probe = self.work.with_name(f"{self.work.name}.probe")
        make_marked(probe)
        with folder(self.target.parent) as parent:
            target = self.target.name
            try:
                os.rename(target, probe.name, src_dir_fd=parent, dst_dir_fd=parent)
            except OSError as error:
                found = error.errno
            else:
                os.rename(probe.name, target, src_dir_fd=parent, dst_dir_fd=parent)
                return
        remove_marked(probe)
        if found == errno.EBUSY:
            raise TargetError(
                f"{self.target}: a mount point, which nothing can take the place of; "
                "name a directory in it"
            )
        if found == errno.EXDEV and list_folder(self.target):
            raise TargetError(
                f"{self.target}: lies in a lower layer of an overlay file system, which cannot "
                "be renamed; remove it first, or name another"
            )

    def require_exact(self) -> None:
        """Refuse a hidden directory with anything in it that TARGET will not hold."""
        folders = {str(parent) for name in self.names for parent in PurePath(name).parents}
        with folder(self.work) as place:
            for base, inner, files, descriptor in os.fwalk(".", dir_fd=place):
                for name in (*inner, *files):
                    where = os.path.normpath(f"{base}/{name}")
                    state = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    known = where in (folders if stat.S_ISDIR(state.st_mode) else self.names)
                    if problem := _foreign(state, known):
                        raise ForeignError(f"{self.work / where}: {problem}")

    def other_ranks(self) -> list[int]:
        """The ranks from 1 on whose journals lie beside this one."""
        begin = f"{journal_path(self.target).name}."
        names = list_folder(self.target.parent)
        ends = (name.removeprefix(begin) for name in names if name.startswith(begin))
        return sorted(int(end) for end in ends if end.isdecimal() and end.isascii())

    def discard(self) -> None:
        """Remove what was made, and the journals with it."""
        remove_folder(self.work, self.inode)
        with suppress(TargetError):
            remove_marked(rounded_path(self.target))
        self._remove_journals()

    def _remove_journals(self) -> None:
        # The one that holds the lock goes last: it says whose the others are.
        for rank in (*self.other_ranks(), 0):
            journal_path(self.target, rank).unlink(missing_ok=True)

    def replaces(self) -> int | None:
        """The inode of the TARGET that is there, None without one."""
        return self.target.stat().st_ino if self.target.exists() else None

    def publish(self, replaces: int | None) -> Path | None:
        """Rename last: whoever sees TARGET may rely on every file in it.

        Returns what is left of a TARGET that was replaced and could not be removed.
        """
        self.require_exact()
        self._open_to_others()
        for place, _, _ in os.walk(self.work):
            sync_directory(Path(place))
        sync_directory(self.target.parent)
        try:
            with folder(self.target.parent) as parent:
                self._rename(parent)
        except OSError as error:
            raise DiskError(f"{self.target}: cannot be renamed: {error.strerror}") from None
        return self.finish(replaces)

    def _open_to_others(self) -> None:
        """Whoever may read the files in TARGET may enter it."""
        with folder(self.work) as place:
            descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
            try:
                state = os.fstat(descriptor)
                files = [os.stat(name, dir_fd=place).st_mode & 0o444 for name in self.names]
                readable = min(files, default=0)
                os.fchmod(descriptor, stat.S_IMODE(state.st_mode) | readable | readable >> 2)
            finally:
                os.close(descriptor)

    def _rename(self, parent: int) -> None:
        work, target, old = self.work.name, self.target.name, self.old.name
        if not os.path.lexists(self.target) or not list_folder(self.target):
            os.rename(work, target, src_dir_fd=parent, dst_dir_fd=parent)
        elif not _exchange(parent, work, target):
            os.rename(target, old, src_dir_fd=parent, dst_dir_fd=parent)
            os.rename(work, target, src_dir_fd=parent, dst_dir_fd=parent)

    def finish(self, replaced: int | None) -> Path | None:
        """Remove what is left beside a TARGET that has been renamed; returns what cannot be."""
        sync_directory(self.target.parent)
        left = [path for path in (self.work, self.old) if not remove_folder(path, replaced)]
        self.inode = None
        self.discard()
        return left[0] if left else None


def _mount_below(target: Path) -> str | None:
    """A mount point in a directory, None without one, or where the system does not tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return None
    inside = os.fsencode(target.resolve()) + b"/"
    for line in lines:
        place = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        if place.startswith(inside):
            return os.fsdecode(place)
    return None


def _foreign(state: os.stat_result, known: bool) -> str | None:
    """Why something in the hidden directory is none of ours."""
    if stat.S_ISLNK(state.st_mode):
        return "a link, which no conversion makes; remove it"
    if not known:
        return "not of this conversion, in its hidden directory; move it away"
    if stat.S_ISREG(state.st_mode) and state.st_nlink != 1:
        return "has a second name elsewhere (a hard link); remove it"
    return None


def _exchange(parent: int, one: str, other: str) -> bool:
    """Swap two directories in one step, so that neither is ever missing; False where unknown."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(parent, os.fsencode(one), parent, os.fsencode(other), _EXCHANGE) == 0:
        return True
    error = ctypes.get_errno()
    if error not in _NO_EXCHANGE:
        raise OSError(error, os.strerror(error))
    return False


@contextmanager
def workspace(target: Path, restart: bool, names: Set[str]) -> Iterator[Workspace]:
    """The place beside TARGET where it is made; a second writer gets TargetError.

    What an interrupted run left is kept for the next one, unless the error says that it is useless.
    """
    work = work_path(target)
    with locked_journal(target) as descriptor:
        fresh = restart or (os.fstat(descriptor).st_size == 0 and not os.path.lexists(work))
        space = Workspace(target, names, descriptor, fresh, marked(descriptor))
        if restart:
            _restart(space)
        try:
            yield space
        except ForeignError:
            raise
        except LinkError as error:
            raise TargetError(str(error)) from None
        except GptossError as error:
            if error.exit_code in _USELESS or (fresh and error.exit_code in _REFUSED):
                space.discard()
            raise


def _restart(space: Workspace) -> None:
    """Discard what an interrupted run left, and nothing else."""
    for rank in space.other_ranks():
        with locked_journal(space.target, rank) as other:
            os.ftruncate(other, 0)
    if os.path.lexists(space.work) and own_folder(space.work).st_ino != space.inode:
        if list_folder(space.work):
            raise TargetError(
                f"{space.work}: not the directory of an interrupted run: its journal does not "
                "speak of it; move it away"
            )
        space.work.rmdir()
    remove_folder(space.work, space.inode)
    remove_marked(rounded_path(space.target))
    os.ftruncate(space.journal, 0)
    space.inode = None


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

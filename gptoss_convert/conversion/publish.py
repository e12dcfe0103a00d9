"""Publishing: what was made in the hidden directory takes the place of TARGET all at once."""

from __future__ import annotations

import errno
import os
import re
import stat
import zlib
from pathlib import Path

from gptoss_convert.containers.walk import folder
from gptoss_convert.conversion import manifest
from gptoss_convert.conversion.journal import Publishing
from gptoss_convert.conversion.workspace import Workspace
from gptoss_convert.errors import DiskError, TargetError
from gptoss_convert.machine.private import list_folder, make_marked, remove_folder, remove_marked
from gptoss_convert.machine.small_files import sync_directory

_NO_EXCHANGE = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_EXCHANGE = 2
"""RENAME_EXCHANGE of renameat2."""


def require_replaceable(space: Workspace) -> None:
    """Refuse a TARGET that no other can take the place of; raises TargetError.

    It is renamed over a directory that is not empty: where that alone stands in the way, it can
    be moved, and nothing has happened.
    """
    if not os.path.lexists(space.target):
        return
    require_unmounted(space.target)
    probe = space.work.with_name(f"{space.work.name}.probe")
    make_marked(probe)
    with folder(space.target.parent) as parent:
        target = space.target.name
        try:
            os.rename(target, probe.name, src_dir_fd=parent, dst_dir_fd=parent)
        except OSError as error:
            found = error.errno
        else:
            os.rename(probe.name, target, src_dir_fd=parent, dst_dir_fd=parent)
            return
    remove_marked(probe)
    if found == errno.EBUSY:
        raise _mounted(space.target)
    if found == errno.EXDEV and list_folder(space.target):
        raise TargetError(
            f"{space.target}: lies in a lower layer of an overlay file system, which cannot "
            "be renamed; remove it first, or name another"
        )


def require_unmounted(target: Path) -> None:
    """Refuse a TARGET that is a mount point or holds one, as far as the system tells without a try;
    raises TargetError.
    """
    if (found := _mount_in(target)) is None:
        return
    if found == os.path.realpath(target):
        raise _mounted(target)
    raise TargetError(f"{target}: {found} in it is a mount point; unmount it first")


def _mounted(target: Path) -> TargetError:
    return TargetError(
        f"{target}: a mount point, which nothing can take the place of; name a directory in it"
    )


def _mount_in(target: Path) -> str | None:
    """A mount point in a directory, or itself; None without one, or where the system does not
    tell."""
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return None
    inside = os.fsencode(target.resolve()) + b"/"
    for line in lines:
        place = re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), line.split(b" ")[4])
        if f"{os.fsdecode(place)}/".startswith(os.fsdecode(inside)):
            return os.fsdecode(place)
    return None


def publish(space: Workspace, replaces: int | None) -> Path | None:
    """Rename last: whoever sees TARGET may rely on every file in it.

    Returns what is left of a TARGET that was replaced and could not be removed.
    """
    space.require_exact()
    _open_to_others(space)
    for place, _, _ in os.walk(space.work):
        sync_directory(Path(place))
    sync_directory(space.target.parent)
    try:
        with folder(space.target.parent) as parent:
            _rename(space, parent)
    except OSError as error:
        raise DiskError(f"{space.target}: cannot be renamed: {error.strerror}") from None
    return finish(space, replaces)


def _open_to_others(space: Workspace) -> None:
    """Whoever may read the files in TARGET may enter it."""
    with folder(space.work) as place:
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
        try:
            state = os.fstat(descriptor)
            files = [os.stat(name, dir_fd=place).st_mode & 0o444 for name in space.names]
            readable = min(files, default=0)
            os.fchmod(descriptor, stat.S_IMODE(state.st_mode) | readable | readable >> 2)
        finally:
            os.close(descriptor)


def _rename(space: Workspace, parent: int) -> None:
    work, target, old = space.work.name, space.target.name, space.old.name
    if not os.path.lexists(space.target) or not list_folder(space.target):
        os.rename(work, target, src_dir_fd=parent, dst_dir_fd=parent)
    elif not _exchange(parent, work, target):
        os.rename(target, old, src_dir_fd=parent, dst_dir_fd=parent)
        os.rename(work, target, src_dir_fd=parent, dst_dir_fd=parent)


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


def finish(space: Workspace, replaced: int | None) -> Path | None:
    """Remove what is left beside a TARGET that has been renamed; returns what cannot be."""
    sync_directory(space.target.parent)
    left = [path for path in (space.work, space.old) if not remove_folder(path, replaced)]
    space.inode = None
    space.discard()
    return left[0] if left else None


def is_published(space: Workspace, publishing: Publishing) -> bool:
    """Whether an interrupted run had renamed its work to TARGET already."""
    path = space.target / manifest.NAME
    if not path.is_file() or space.target.stat().st_ino != publishing.inode:
        return False
    return zlib.crc32(path.read_bytes()) == publishing.manifest

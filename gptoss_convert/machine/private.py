"""Directories and files of this account alone, made beside TARGET: ours, or refused.

Where others may write, somebody may have made the name first: a link, a directory or a file of his.
"""

from __future__ import annotations

import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

from gptoss_convert.containers.paths import create_inside
from gptoss_convert.containers.walk import LinkError, folder
from gptoss_convert.errors import TargetError
from gptoss_convert.errors.refusals import disk_error

MARK = ".gptoss-convert"
"""In a hidden directory that no journal speaks of: whoever finds it may remove all of it."""
_OPEN = stat.S_IWGRP | stat.S_IWOTH


def make_folder(path: Path) -> bool:
    """Make a directory that this account alone may enter; False if there is something already."""
    try:
        with folder(path.parent) as parent:
            os.mkdir(path.name, 0o700, dir_fd=parent)
    except FileExistsError:
        return False
    except OSError as error:
        raise disk_error(path, error) from None
    return True


def own_folder(path: Path) -> os.stat_result:
    """The state of a directory that this account made and nobody else may write to.

    Raises TargetError for any other, and for what is no directory.
    """
    try:
        with folder(path) as found:
            state = os.fstat(found)
    except (LinkError, NotADirectoryError):
        raise TargetError(f"{path}: not a directory of an interrupted run; remove it") from None
    except OSError as error:
        raise disk_error(path, error) from None
    require_own(path, state)
    return state


def require_own(path: Path, state: os.stat_result) -> None:
    """Refuse what another account made or may write to; raises TargetError."""
    owner, open_to = state.st_uid, state.st_mode & _OPEN
    if owner == os.geteuid() and not open_to:
        return
    # Some file systems give everything one owner and one mode: compare with what is made here now.
    fresh = _fresh(path.parent)
    if owner != fresh.st_uid:
        raise TargetError(f"{path}: belongs to another user; remove it, or name another TARGET")
    if open_to & ~fresh.st_mode:
        raise TargetError(f"{path}: others may write to it; remove it, or name another TARGET")


def _fresh(parent: Path) -> os.stat_result:
    name = f"{MARK}-{os.urandom(8).hex()}"
    try:
        with folder(parent) as place:
            os.mkdir(name, 0o700, dir_fd=place)
            try:
                return os.stat(name, dir_fd=place, follow_symlinks=False)
            finally:
                os.rmdir(name, dir_fd=place)
    except OSError as error:
        raise disk_error(parent, error) from None


def remove_folder(path: Path, inode: int | None) -> bool:
    """Remove the directory of this inode, which is ours; False if some of it is left."""
    if inode is None:
        return True
    with suppress(OSError, LinkError), folder(path.parent) as parent:
        state = os.stat(path.name, dir_fd=parent, follow_symlinks=False)
        if stat.S_ISDIR(state.st_mode) and state.st_ino == inode:
            shutil.rmtree(path.name, ignore_errors=True, dir_fd=parent)
            return not os.path.lexists(path)
    return True


def make_marked(path: Path) -> None:
    """Make a directory anew, in place of one that carries the mark; raises TargetError."""
    remove_marked(path)
    if not make_folder(path):
        raise TargetError(f"{path}: not a directory of an interrupted run; remove it")
    os.close(create_inside(path, MARK, os.O_WRONLY))


def remove_marked(path: Path) -> None:
    """Remove a directory that carries the mark, or is empty, and no other."""
    if not os.path.lexists(path):
        return
    state = own_folder(path)
    names = list_folder(path)
    if not names or MARK in names:
        remove_folder(path, state.st_ino)


def list_folder(path: Path) -> list[str]:
    """The names in a directory, which no link leads to."""
    with folder(path) as place:
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
        try:
            return sorted(entry.name for entry in os.scandir(descriptor))
        finally:
            os.close(descriptor)

"""Untrusted trees: names from checkpoints never lead out of their directory, nor do links.

A path that the user named is settled once: its links are resolved. A link that appears on the way
to it later was put there by somebody else, and is refused. Within a checkpoint's own directory,
links are resolved by hand, never above it (`walk`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from gptoss_convert.containers.disguise import LOOKED_AT, disguise
from gptoss_convert.containers.refs import FileRef, Identity
from gptoss_convert.containers.seen import changed, remember
from gptoss_convert.containers.walk import FOLDER, LinkError, OutsideError, folder, told, walk
from gptoss_convert.errors import InputError, IntegrityError, TargetError

_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')
_READ = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
AnyPath = TypeVar("AnyPath", bound=Path)


class Followed(type(Path())):
    """A directory whose links may lead anywhere, since its user said so (--follow-links).

    Every path that is made from it is one, too: whoever opens a file needs no flag.
    """


def settled(path: AnyPath) -> AnyPath:
    """A path that its user named, its links resolved: what is a link later was put there."""
    if isinstance(path, Followed):
        return path
    if any(place.is_symlink() for place in (path, *path.parents)):
        return type(path)(os.path.realpath(path))
    return path


def safe_name(name: str, folders: bool = False) -> bool:
    """Whether `name` is a plain relative file name on POSIX and on Windows."""
    parts = name.split("/")
    return (
        # Printable names have no half characters, which no file name can hold.
        name.isprintable()
        and 0 < len(name.encode()) <= 255
        and (folders or len(parts) == 1)
        and all(part not in {"", ".", ".."} for part in parts)
        and not _FORBIDDEN.search(name)
    )


def open_inside(root: Path, name: str) -> BinaryIO:
    """Open `root/name` for reading, unbuffered.

    Links may lead to other files in `root` and to the Hub cache's blobs, and anywhere if `root` is
    Followed; on the way to `root` there is none.
    """
    path = root / name
    with told(path):
        descriptor = _followed(path) if isinstance(root, Followed) else _inside(root, name)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise InputError(f"{path}: not a regular file")
        remember(root, name, descriptor)
    except BaseException:
        os.close(descriptor)
        raise
    return os.fdopen(descriptor, "rb", buffering=0)


def _followed(path: Path) -> int:
    try:
        return os.open(path, _READ)
    except FileNotFoundError:
        if path.is_symlink():
            raise IntegrityError(f"{path}: dangling link") from None
        raise


def _inside(root: Path, name: str) -> int:
    try:
        with walk(root, name) as place:
            return os.open(place.last, _READ | os.O_NOFOLLOW, dir_fd=place.folder)
    except OutsideError as error:
        blob = error.place
        if not _is_blob(blob, root.absolute()):
            raise _outside(root / name, blob) from None
        try:
            with folder(blob.parent) as blobs:
                return os.open(blob.name, _READ | os.O_NOFOLLOW, dir_fd=blobs)
        except FileNotFoundError:
            raise IntegrityError(f"{root / name}: dangling link") from None


def _outside(path: Path, place: Path) -> InputError:
    return InputError(
        f"{path}: links to {place}, outside the checkpoint; pass --follow-links if you trust it"
    )


def _is_blob(place: Path, root: Path) -> bool:
    """The Hub cache keeps `snapshots/<commit>/file` as links to `blobs/<hash>` of the same repo."""
    for parent in (root, *root.parents):
        if parent.parent.name == "snapshots":
            return place.parent == parent.parent.parent / "blobs"
    return False


def open_file(file: FileRef) -> BinaryIO:
    """Open a file as `open_inside` does.

    Raises IntegrityError if it is another file, or was written to, since its header was read.
    """
    opened = open_inside(file.root, file.name)
    if file.identity not in {None, Identity.of(opened.fileno())}:
        opened.close()
        raise changed(file)
    return opened


def require_unchanged(files: Iterable[FileRef]) -> None:
    """Raise IntegrityError unless each file is there as it was when it was read."""
    for file in files:
        try:
            open_file(file).close()
        except (InputError, IntegrityError):
            raise IntegrityError(f"{file}: changed while it was being read") from None


def folder_inside(root: Path, name: str) -> Path | None:
    """The directory `root/name` by a way without links; None if there is none.

    Raises InputError if a link leads out of `root`, unless that is Followed; IntegrityError for one
    to nowhere.
    """
    if isinstance(root, Followed):
        return root / name if lies(root, name) and (root / name).is_dir() else None
    try:
        with walk(root, name) as place:
            os.close(os.open(place.last, FOLDER, dir_fd=place.folder))
            return root.joinpath(*place.names)
    except OutsideError as error:
        raise _outside(root / name, error.place) from None
    except (FileNotFoundError, NotADirectoryError):
        return None


def lies(root: Path, name: str) -> bool:
    """Whether something lies at `root/name`; whoever opens it judges where links lead.

    Raises IntegrityError for a link to nowhere: what it stood for is missing, not absent.
    """
    path = root / name
    if path.exists():
        return True
    below = (path, *path.parents)[: len(path.parts) - len(root.parts)]
    if dangling := next((place for place in below if place.is_symlink()), None):
        raise IntegrityError(f"{dangling}: dangling link")
    return False


def create_inside(root: Path, name: str, flags: int) -> int:
    """Open `root/name` to write; it and its folders are made if they are not there.

    Raises OSError, and TargetError where a link, or a file with a second name, lies in the way.
    """
    *folders, last = name.split("/")
    try:
        with folder(root) as here, ExitStack() as held:
            for part in folders:
                with suppress(FileExistsError):
                    os.mkdir(part, 0o755, dir_fd=here)
                here = os.open(part, FOLDER, dir_fd=here)
                held.callback(os.close, here)
            kind = flags | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            descriptor = os.open(last, kind, 0o644, dir_fd=here)
    except LinkError as error:
        raise TargetError(str(error)) from None
    except OSError as error:
        if error.errno in {errno.ELOOP, errno.ENOTDIR}:
            raise TargetError(
                f"{root / name}: a link, which no conversion makes; remove it"
            ) from None
        raise
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink != 1:
        os.close(descriptor)
        raise TargetError(f"{root / name}: not a file of one name alone; remove it")
    return descriptor


def read_text(root: Path, name: str, most: int) -> str:
    """The text of `root/name`; raises IntegrityError beyond `most` bytes or UTF-8, and for what is
    no such file by how it begins."""
    with open_inside(root, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise IntegrityError(f"{root / name}: {size} bytes, at most {most}")
        raw = file.read(size)
    if found := disguise(raw[:LOOKED_AT], len(raw)):
        raise IntegrityError(f"{root / name}: {found}")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{root / name}: not UTF-8 at byte {error.start}") from None

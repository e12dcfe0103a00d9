"""Paths inside a checkpoint: names from untrusted files never lead out of its directory."""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

from gptoss_convert.errors import DiskError, InputError, IntegrityError

POINTER = b"version https://git-lfs.github.com/spec/"
"""How a file begins that Git LFS has not fetched."""
_FORBIDDEN = re.compile(r'[\x00-\x1f\x7f\\:*?"<>|]')


class Followed(type(Path())):
    """A directory whose links may lead anywhere, since its user said so (--follow-links).

    Every path that is made from it is one, too: whoever opens a file needs no flag.
    """


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

    Links may lead to the Hub cache's blobs, and anywhere if `root` is Followed.
    """
    path = root / name
    try:
        real = path.resolve(strict=True)
    except FileNotFoundError:
        what = "dangling link" if path.is_symlink() else "no such file"
        raise IntegrityError(f"{path}: {what}") from None
    except (OSError, RuntimeError) as error:
        raise DiskError(f"{path}: {error}") from None
    base = root.resolve()
    inside = real.is_relative_to(base) or _is_blob(real, base)
    if not inside and not isinstance(root, Followed):
        raise InputError(
            f"{path}: links to {real}, outside the checkpoint; pass --follow-links if you trust it"
        )
    try:
        descriptor = os.open(real, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InputError(f"{path}: not a regular file")
    return os.fdopen(descriptor, "rb", buffering=0)


def read_text(root: Path, name: str, most: int) -> str:
    """The text of `root/name`; raises IntegrityError beyond `most` bytes or UTF-8."""
    with open_inside(root, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size > most:
            raise IntegrityError(f"{root / name}: {size} bytes, at most {most}")
        raw = file.read(size)
    if raw.startswith(POINTER):
        raise IntegrityError(f"{root / name}: a Git LFS pointer; fetch the file: git lfs pull")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{root / name}: not UTF-8 at byte {error.start}") from None


def _is_blob(real: Path, base: Path) -> bool:
    """The Hub cache keeps `snapshots/<commit>/file` as links to `blobs/<hash>` of the same repo."""
    for parent in (base, *base.parents):
        if parent.parent.name == "snapshots":
            return real.parent == parent.parent.parent / "blobs"
    return False

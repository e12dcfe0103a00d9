"""Files as values: a directory and a name in it, never a string that must be taken apart."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Identity:
    """Which file an open descriptor is of, and in which state: equal only if nothing was written.

    The time of a change (ctime) cannot be set back, as the time of writing (mtime) can.
    """

    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int

    @classmethod
    def of(cls, descriptor: int) -> Identity:
        """The identity of an open file, now."""
        now = os.fstat(descriptor)
        inode = 0 if _numbered_anew(now.st_dev) else now.st_ino
        return cls(now.st_dev, inode, now.st_size, now.st_mtime_ns, now.st_ctime_ns)


@cache
def _numbered_anew(device: int) -> bool:
    """Whether a file system may give a file another inode each time it is looked up, as FUSE does
    for object stores."""
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return False
    kinds = (line.partition(" - ")[2] for line in lines if line.split(" ")[2] == number)
    return any(kind.startswith("fuse") for kind in kinds)


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file: the directory that it lies in, and its name there in POSIX form."""

    root: Path
    name: str
    identity: Identity | None = field(default=None, compare=False, repr=False)
    """What it was when its header was read, where one was."""

    @property
    def path(self) -> Path:
        """Where it lies, unless its directory is found elsewhere by now."""
        return self.root / self.name

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Copied:
    """A small file of TARGET that is a copy of another: known by its size until it is written."""

    file: FileRef
    size: int

"""Files as values: a directory and a name in it, never a string that must be taken apart."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class FileRef:
    """A file: the directory that it lies in, and its name there in POSIX form."""

    root: Path
    name: str

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

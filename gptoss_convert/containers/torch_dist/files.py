"""Positional reads of one file, bounded by its size."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.containers.paths import open_inside
from gptoss_convert.containers.refs import Identity
from gptoss_convert.errors import DiskError, IntegrityError


@dataclass(frozen=True, slots=True)
class OpenFile:
    """A file open for reading; `size` as it was when opened."""

    path: Path
    descriptor: int
    size: int
    identity: Identity

    def read_at(self, offset: int, size: int) -> bytes:
        """Return exactly `size` bytes. IntegrityError, before allocating, if there are fewer."""
        if not 0 <= offset <= offset + size <= self.size:
            raise IntegrityError(
                f"{self.path}: truncated: {size} bytes expected at {offset} of {self.size}"
            )
        try:
            content = os.pread(self.descriptor, size, offset)
        except OSError as error:
            raise DiskError(f"{self.path}: {error.strerror}") from None
        if len(content) != size:
            raise IntegrityError(f"{self.path}: became shorter while it was read")
        return content


@contextmanager
def open_file(directory: Path, name: str) -> Iterator[OpenFile]:
    """Open a file of a checkpoint directory for as long as the context lasts."""
    with open_inside(directory, name) as stream:
        descriptor = stream.fileno()
        identity = Identity.of(descriptor)
        yield OpenFile(directory / name, descriptor, identity.size, identity)

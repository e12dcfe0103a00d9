"""Positional file I/O into page-aligned buffers, past the page cache where the file system allows.

The kernel's page cache costs more than the disk (docs/performance.md), so whole pages go through a
descriptor opened with O_DIRECT and only ragged ends through a second, buffered one.
"""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from isal import isal_zlib

from gptoss_convert.containers.paths import open_file, require_unchanged, settled
from gptoss_convert.containers.refs import FileRef, Identity
from gptoss_convert.errors import DiskError, IntegrityError
from gptoss_convert.errors.refusals import disk_error
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.failures import UNSUPPORTED
from gptoss_convert.machine.ram_disk import SharedPages

_DIRECT = getattr(os, "O_DIRECT", 0)
_PIECE = 4 << 20


class File:
    """A file open twice: once past the page cache if possible, once through it."""

    def __init__(self, path: Path, buffered: int, flags: int) -> None:
        self.path = path
        self.buffered = buffered
        self.identity = Identity.of(buffered)
        self.direct: int | None = None
        self.exact = False
        """Whether bytes that fill no page may be written past the page cache, too."""
        self.pages: SharedPages | None = None
        """For several threads to write at once, where the file lies in memory."""
        # Where descriptors are scarce, every file gets one before any file gets two.
        if buffered < resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            with suppress(OSError):
                path_of = f"/proc/self/fd/{buffered}"
                self.direct = os.open(path_of, flags | _DIRECT | os.O_CLOEXEC)

    def sync(self) -> None:
        """Wait until every byte is on the disk."""
        try:
            os.fsync(self.buffered)
        except OSError as error:
            raise disk_error(self.path, error) from None

    def close(self) -> None:
        """Close both."""
        if self.pages is not None:
            self.pages.close()
        for descriptor in (self.direct, self.buffered):
            if descriptor is not None:
                os.close(descriptor)
        self.direct = None


class ByteSource(Protocol):
    """What the workers read from: files on disk, or bytes that are made when they are asked for."""

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Fill the arena at `position` with bytes of `file`; called from many threads."""
        ...


Places = Mapping[Path, Path]
"""Where directories lie by now, for those that moved since a plan named them."""


def moved(file: FileRef, places: Places) -> FileRef:
    """Where a file lies by now; one that moved is another than when the plan was made."""
    place = places.get(file.root)
    return FileRef(settled(place), file.name) if place else file


Key = TypeVar("Key", FileRef, str)


class OpenFiles(Generic[Key]):
    """Files, opened as they are needed and closed when the context ends."""

    def __init__(self) -> None:
        self._open: dict[Key, File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        for file in self._open.values():
            file.close()


class SourceFiles(OpenFiles[FileRef]):
    """Files that are opened when they are needed and read by position; safe to share between
    threads. Those that nobody reads are closed where descriptors are scarce.
    """

    def __init__(self, places: Places | None = None) -> None:
        super().__init__()
        self._places = places or {}
        self._lock = threading.Lock()
        self._readers: Counter[FileRef] = Counter()
        self._found: dict[FileRef, Identity] = {}
        """What each file was when it was opened first."""

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Fill the arena at `position`, which has the phase of `offset`; raises IntegrityError."""
        with self._lock:
            opened = self._opened(file)
            self._readers[file] += 1
        try:
            self._read(opened, offset, nbytes, arena, position)
        finally:
            with self._lock:
                self._readers[file] -= 1

    def _read(self, file: File, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        if file.direct is not None:
            lead = offset % PAGE
            whole = -(-(lead + nbytes) // PAGE) * PAGE
            try:
                got = _read_all(
                    file.direct, arena, position - lead, whole, offset - lead, lead + nbytes
                )
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise DiskError(f"{file.path}: {error.strerror} at byte {offset}") from None
                file.direct = None
            else:
                _check_length(file, offset, nbytes, got - lead)
                return
        try:
            got = _read_all(file.buffered, arena, position, nbytes, offset, nbytes)
        except OSError as error:
            raise DiskError(f"{file.path}: {error.strerror} at byte {offset}") from None
        _check_length(file, offset, nbytes, got)

    def crc(self, file: FileRef, offset: int, nbytes: int, arena: Arena) -> int:
        """The CRC-32 of a range, read through the arena piece by piece."""
        crc = 0
        for start in range(offset, offset + nbytes, _PIECE):
            length = min(_PIECE, offset + nbytes - start)
            arena.reset(length + 2 * PAGE)
            position = arena.take(length, start)
            self.read(file, start, length, arena, position)
            crc = isal_zlib.crc32(memoryview(arena.memory)[position : position + length], crc)
        return crc

    def require_unchanged(self) -> None:
        """Refuse a source that changed since its header was read; raises IntegrityError."""
        require_unchanged(
            replace(moved(ref, self._places), identity=identity)
            for ref, identity in self._found.items()
        )

    def _opened(self, file: FileRef) -> File:
        if file not in self._open:
            now = moved(file, self._places)
            now = replace(now, identity=self._found.get(file, now.identity))
            try:
                descriptor = _descriptor(now)
            except DiskError as error:
                if not _is_lack_of_descriptors(error) or not self._close_idle():
                    raise
                descriptor = _descriptor(now)
            opened = self._open[file] = File(now.path, descriptor, os.O_RDONLY)
            self._found.setdefault(file, opened.identity)
        return self._open[file]

    def _close_idle(self) -> bool:
        """Whether there were any that nobody reads; they are opened again when they are needed."""
        idle = [file for file in self._open if not self._readers[file]]
        for file in idle:
            self._open.pop(file).close()
        return bool(idle)


def _descriptor(file: FileRef) -> int:
    with open_file(file) as stream:
        try:
            return os.dup(stream.fileno())
        except OSError as error:
            raise disk_error(file, error) from error


def _is_lack_of_descriptors(error: DiskError) -> bool:
    return isinstance(error.__cause__, OSError) and error.__cause__.errno == errno.EMFILE


def _read_all(
    descriptor: int, arena: Arena, position: int, nbytes: int, offset: int, enough: int
) -> int:
    """Read until `enough` bytes have come or the file ends; returns the bytes read."""
    view = memoryview(arena.memory)
    got = 0
    while got < enough:
        count = os.preadv(descriptor, [view[position + got : position + nbytes]], offset + got)
        if count == 0:
            break
        got += count
    return got


def _check_length(file: File, offset: int, wanted: int, got: int) -> None:
    if got < wanted:
        raise IntegrityError(
            f"{file.path}: truncated: expected {wanted} bytes at {offset}, found {max(got, 0)}"
        )

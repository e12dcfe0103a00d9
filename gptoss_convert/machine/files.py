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
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Generic, Protocol, Self, TypeVar

from isal import isal_zlib

from gptoss_convert.containers.paths import create_inside, open_file, require_unchanged, settled
from gptoss_convert.containers.refs import FileRef, Identity
from gptoss_convert.errors import DiskError, IntegrityError
from gptoss_convert.errors.refusals import disk_error
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.failures import UNSUPPORTED

_DIRECT = getattr(os, "O_DIRECT", 0)
_PIECE = 4 << 20
_MANY, _AT_ONCE = 64, 32
"""From so many files on, so many are synced side by side."""


class _File:
    """A file open twice: once past the page cache if possible, once through it."""

    def __init__(self, path: Path, buffered: int, flags: int) -> None:
        self.path = path
        self.buffered = buffered
        self.identity = Identity.of(buffered)
        self.direct: int | None = None
        self.exact = False
        """Whether bytes that fill no page may be written past the page cache, too."""
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


class _OpenFiles(Generic[Key]):
    """Files, opened as they are needed and closed when the context ends."""

    def __init__(self) -> None:
        self._open: dict[Key, _File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        for file in self._open.values():
            file.close()


class SourceFiles(_OpenFiles[FileRef]):
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

    def _read(self, file: _File, offset: int, nbytes: int, arena: Arena, position: int) -> None:
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

    def _opened(self, file: FileRef) -> _File:
        if file not in self._open:
            now = moved(file, self._places)
            now = replace(now, identity=self._found.get(file, now.identity))
            try:
                descriptor = _descriptor(now)
            except DiskError as error:
                if not _is_lack_of_descriptors(error) or not self._close_idle():
                    raise
                descriptor = _descriptor(now)
            opened = self._open[file] = _File(now.path, descriptor, os.O_RDONLY)
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


def _check_length(file: _File, offset: int, wanted: int, got: int) -> None:
    if got < wanted:
        raise IntegrityError(
            f"{file.path}: truncated: expected {wanted} bytes at {offset}, found {max(got, 0)}"
        )


class TargetFiles(_OpenFiles[str]):
    """The files of a directory being written: sized first, filled in any order, synced last.

    Where other machines write the same files, bytes that fill no page go past the page cache, too,
    if the file system takes them: NFS writes back whole pages, with what it read there before.
    """

    def __init__(self, root: Path, *, other_machines: bool = False) -> None:
        super().__init__()
        self.root = root
        self._other_machines = other_machines
        self._dirty: set[str] = set()
        """The files that were written since the last sync."""

    def create(self, name: str, size: int) -> None:
        """Create `name` with its final size, or open what an interrupted run left of it."""
        path = self.root / name
        try:
            descriptor = create_inside(self.root, name, os.O_RDWR)
            os.ftruncate(descriptor, size)
        except OSError as error:
            raise disk_error(path, error) from None
        self._open[name] = file = _File(path, descriptor, os.O_RDWR)
        file.exact = self._other_machines and file.direct is not None
        self._dirty.add(name)

    def write(self, name: str, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Write from the arena: whole pages directly, ragged ends through the page cache."""
        self._write_part(self._open[name], offset, nbytes, arena, position)
        # Marked afterwards: a sync under way takes the mark of what was written before it began.
        self._dirty.add(name)

    def _write_part(
        self, file: _File, offset: int, nbytes: int, arena: Arena, position: int
    ) -> None:
        view = memoryview(arena.memory)
        start, stop = -(-offset // PAGE) * PAGE, (offset + nbytes) // PAGE * PAGE
        if file.direct is None or start >= stop or (position - offset) % PAGE:
            self._write_ragged(file, view[position : position + nbytes], offset)
            return
        first, last = position + start - offset, position + stop - offset
        try:
            self._write(file, file.direct, view[first:last], start)
        except _DirectRefusedError:
            file.direct = None
            self._write(file, file.buffered, view[first:last], start)
        if start > offset:
            self._write_ragged(file, view[position:first], offset)
        if stop < offset + nbytes:
            self._write_ragged(file, view[last : position + nbytes], stop)

    def write_bytes(self, name: str, offset: int, content: bytes) -> None:
        """Write bytes that are known beforehand."""
        self._write_ragged(self._open[name], memoryview(content), offset)
        self._dirty.add(name)

    def write_zeros(self, name: str, offset: int, length: int) -> None:
        """Write zeros where there are others; what was never written stays a hole."""
        file = self._open[name]
        for at in range(offset, offset + length, _PIECE):
            nbytes = min(_PIECE, offset + length - at)
            try:
                found = os.pread(file.buffered, nbytes, at)
            except OSError as error:
                raise disk_error(file.path, error) from None
            if found.strip(b"\0") or len(found) < nbytes:
                self.write_bytes(name, at, bytes(nbytes))

    def sync(self) -> None:
        """Wait until every byte that was written is on the disk."""
        dirty = {name for name in self._open if name in self._dirty}
        self._dirty -= dirty
        files = [self._open[name] for name in sorted(dirty)]
        if len(files) < _MANY:
            for file in files:
                file.sync()
            return
        # A file system writes its own journal once for all that wait for it.
        with ThreadPoolExecutor(_AT_ONCE, "sync") as pool:
            for done in [pool.submit(file.sync) for file in files]:
                done.result()

    def _write_ragged(self, file: _File, view: memoryview, offset: int) -> None:
        if file.exact and file.direct is not None:
            try:
                self._write(file, file.direct, view, offset)
                return
            except _DirectRefusedError:
                file.exact = False
        self._write(file, file.buffered, view, offset)

    @staticmethod
    def _write(file: _File, descriptor: int, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            try:
                done += os.pwrite(descriptor, view[done:], offset + done)
            except OSError as error:
                if descriptor == file.direct and error.errno in UNSUPPORTED:
                    raise _DirectRefusedError from None
                raise disk_error(file.path, error) from None


class _DirectRefusedError(Exception):
    """The file system opened a file with O_DIRECT but refuses to write so."""

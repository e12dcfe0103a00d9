"""The files of a directory that is being written."""

from __future__ import annotations

import os
from pathlib import Path

from gptoss_convert.containers.paths import create_inside
from gptoss_convert.errors.refusals import disk_error
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.failures import UNSUPPORTED
from gptoss_convert.machine.files import File, OpenFiles
from gptoss_convert.machine.ram_disk import SharedPages, lies_in_memory

_PIECE = 4 << 20
_MANY, _AT_ONCE = 64, 32
"""From so many files on, so many are synced side by side."""


class TargetFiles(OpenFiles[str]):
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
        self._open[name] = file = File(path, descriptor, os.O_RDWR)
        file.exact = self._other_machines and file.direct is not None
        if lies_in_memory(descriptor):
            file.pages = SharedPages(descriptor, size)
        self._dirty.add(name)

    def write(self, name: str, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Write from the arena: whole pages directly, ragged ends through the page cache."""
        file = self._open[name]
        if file.pages is None:
            self._write_part(file, offset, nbytes, arena, position)
        else:
            content = memoryview(arena.memory)[position : position + nbytes]
            self._write_in_memory(file, file.pages, content, offset)
        # Marked afterwards: a sync under way takes the mark of what was written before it began.
        self._dirty.add(name)

    def _write_part(
        self, file: File, offset: int, nbytes: int, arena: Arena, position: int
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

    def _write_in_memory(
        self, file: File, pages: SharedPages, view: memoryview, offset: int
    ) -> None:
        # A write costs half of what a map does, and waiting for one nothing; for many, too long.
        if pages.turns.acquire(blocking=False):
            try:
                with pages.writing:
                    self._write(file, file.buffered, view, offset)
            finally:
                pages.turns.release()
        elif not pages.write(view, offset):
            # What stands in the way of a map does no harm here, or is told by an error.
            with pages.writing:
                self._write(file, file.buffered, view, offset)

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
        from concurrent.futures import ThreadPoolExecutor

        # A file system writes its own journal once for all that wait for it.
        with ThreadPoolExecutor(_AT_ONCE, "sync") as pool:
            for done in [pool.submit(file.sync) for file in files]:
                done.result()

    def _write_ragged(self, file: File, view: memoryview, offset: int) -> None:
        if file.exact and file.direct is not None:
            try:
                self._write(file, file.direct, view, offset)
                return
            except _DirectRefusedError:
                file.exact = False
        self._write(file, file.buffered, view, offset)

    @staticmethod
    def _write(file: File, descriptor: int, view: memoryview, offset: int) -> None:
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

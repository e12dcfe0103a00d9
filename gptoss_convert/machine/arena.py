"""The memory that a worker reads into and writes from."""

from __future__ import annotations

import mmap
from contextlib import suppress

PAGE = 4096


class Arena:
    """One worker's buffer: page-aligned anonymous memory, handed out anew for every step.

    Private, since huge pages, and with them long requests to the disk, are seldom allowed for
    shared memory. Not inherited by fork, which would copy pages that a disk is writing to.
    """

    def __init__(self, nbytes: int) -> None:
        self._allocate(nbytes)

    def _allocate(self, nbytes: int) -> None:
        self.memory = mmap.mmap(-1, max(nbytes, PAGE), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        for advice in ("MADV_HUGEPAGE", "MADV_DONTFORK"):
            with suppress(AttributeError, OSError):
                self.memory.madvise(getattr(mmap, advice))
        self._free = 0

    def reset(self, nbytes: int) -> None:
        """Start over with room for at least `nbytes`."""
        self._free = 0
        if nbytes > len(self.memory):
            self._allocate(nbytes)

    def mark(self) -> int:
        """Where the memory begins that has not been handed out."""
        return self._free

    def rewind(self, mark: int) -> None:
        """Take back all that was handed out since `mark`."""
        self._free = mark

    def take(self, nbytes: int, phase: int) -> int:
        """A position with room for `nbytes`, whole pages around it, at `phase` within its page."""
        position = self._free + phase % PAGE
        self._free = -(-(position + nbytes) // PAGE) * PAGE
        if self._free > len(self.memory):
            raise AssertionError(f"arena of {len(self.memory)} bytes is too small")
        return position

"""Files of a RAM disk, to which the kernel lets one thread at a time write (decision 15)."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource
import threading
from functools import cache

_KINDS = {0x01021994, 0x858458F6}
"""The numbers of tmpfs and ramfs (statfs(2))."""
_MOST = 4096
"""More bytes than any system's `struct statfs` has; Linux's begins with the kind, a long."""
_CHUNK = 1 << 20
"""Bytes in the map at once: what a thread's map holds counts as memory of the process."""
_FAILED = ctypes.c_void_p(-1).value


class _Range(ctypes.Structure):
    """`struct iovec` of process_vm_writev(2)."""

    _fields_ = (("start", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


@cache
def _libc() -> ctypes.CDLL:
    """The C library; unlike methods of `mmap`, its functions are called without Python's lock."""
    libc = ctypes.CDLL(None, use_errno=True)
    size, start, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    libc.mmap.argtypes = (start, size, number, number, number, ctypes.c_int64)
    libc.mmap.restype = start
    libc.munmap.argtypes = (start, size)
    libc.madvise.argtypes = (start, size, number)
    ranges = (ctypes.POINTER(_Range), ctypes.c_ulong)
    libc.process_vm_writev.argtypes = (number, *ranges, *ranges, ctypes.c_ulong)
    libc.process_vm_writev.restype = ctypes.c_ssize_t
    return libc


def lies_in_memory(descriptor: int) -> bool:
    """Whether an open file lies in a RAM disk; some of these accept O_DIRECT, so it tells nothing.

    The system is asked, not /proc/mounts, which may be hidden or name thousands.
    """
    found = ctypes.create_string_buffer(_MOST)
    if ctypes.CDLL(None).fstatfs(descriptor, found):
        return False
    return ctypes.c_long.from_buffer(found).value in _KINDS


class SharedPages:
    """A map of a file in memory, through which threads write while others use write(2).

    The process never touches the map: process_vm_writev(2) has the kernel copy into it. Where a
    page cannot be had, since the disk is full or the file was cut, it says so; a process that
    touches such a page is ended by SIGBUS.
    """

    def __init__(self, descriptor: int, nbytes: int) -> None:
        self.turns = threading.Semaphore(2)
        """Held by the thread that is in write(2) and by one that waits for it."""
        self.writing = threading.Lock()
        """Held by the thread that is in write(2); who waits for the kernel's lock seldom sleeps."""
        self._descriptor = descriptor
        self._nbytes = nbytes
        self._mapping = threading.Lock()
        self._start: int | None = None
        self._closed = False

    def write(self, source: memoryview, offset: int) -> bool:
        """Write what lies in writable memory to the file; called by many threads.

        False where the system does not do it: then some of the bytes may be written.
        """
        start = self._mapped()
        # Behind the map lies other memory of this process, where the kernel copies as willingly.
        if start is None or not 0 <= offset <= offset + len(source) <= self._nbytes:
            return False
        address = ctypes.addressof(ctypes.c_char.from_buffer(source))
        return all(
            _copy(address + at, start + offset + at, min(_CHUNK, len(source) - at))
            for at in range(0, len(source), _CHUNK)
        )

    def close(self) -> None:
        """Remove the map; the file keeps what was written."""
        with self._mapping:
            self._closed = True
            if self._start is not None:
                _libc().munmap(self._start, self._nbytes)
                self._start = None

    def _mapped(self) -> int | None:
        """The map's address; made when it is needed first, as most files never need one."""
        with self._mapping:
            if self._start is None and not self._closed and _address_space_is_free():
                access, kind = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED
                start = _libc().mmap(None, self._nbytes, access, kind, self._descriptor, 0)
                self._start = None if start == _FAILED else start
            return self._start


def _address_space_is_free() -> bool:
    """Whether a map of a whole file takes nothing from what else needs addresses."""
    return resource.getrlimit(resource.RLIMIT_AS)[0] == resource.RLIM_INFINITY


def _copy(source: int, target: int, nbytes: int) -> bool:
    """Let the kernel copy from address to address of this process, and then forget the pages."""
    given, taken = _Range(source, nbytes), _Range(target, nbytes)
    copied = _libc().process_vm_writev(os.getpid(), given, 1, taken, 1, 0)
    # Of a shared map only this process's entries for the pages go; the file keeps the pages.
    first = target - target % mmap.PAGESIZE
    _libc().madvise(first, target + nbytes - first, mmap.MADV_DONTNEED)
    return copied == nbytes

"""System calls that the kernel refuses from now on, in this process: a seccomp filter, as real as
a file system that knows no locks or a quota that is used up.
"""

from __future__ import annotations

import ctypes
import platform
import struct

import pytest

_NUMBERS = {
    "x86_64": {
        "pwrite64": 18,
        "clone": 56,
        "flock": 73,
        "fsync": 74,
        "process_vm_writev": 311,
        "renameat2": 316,
    },
    "aarch64": {
        "flock": 32,
        "pwrite64": 68,
        "fsync": 82,
        "clone": 220,
        "process_vm_writev": 271,
        "renameat2": 276,
    },
}
_NUMBERS = {machine: {**calls, "clone3": 435} for machine, calls in _NUMBERS.items()}
"""By machine: the numbers of the calls that are refused here."""
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ERRNO, _ALLOW = 0x00050000, 0x7FFF0000

needs_seccomp = pytest.mark.skipif(
    platform.machine() not in _NUMBERS, reason="the numbers of system calls are not listed"
)


def refuse(call: str, error: int) -> None:
    """Let every later call of this name end with an errno; for a child that is going to end."""
    number = _NUMBERS[platform.machine()][call]
    program = (
        (_LOAD, 0, 0, 0),
        (_EQUAL, 0, 1, number),
        (_RETURN, 0, 0, _ERRNO | error),
        (_RETURN, 0, 0, _ALLOW),
    )
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    whole = struct.pack("HxxxxxxP", len(program), ctypes.addressof(filters))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0) or libc.prctl(_SECCOMP, _FILTER, whole, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")

"""The three standard streams of the command, whatever it was started with.

Writing to stderr never raises and shows no secret: a full disk behind it must not decide an exit
status. stdout carries the result, so that an error in writing it is an error of the command (status
5); if it is closed, the result was not wanted.
"""

from __future__ import annotations

import io
import os
import sys

from gptoss_convert.errors.secrets import scrub


def prepare() -> None:
    """Give closed descriptors a place, as the next file would get their numbers, and guard stderr.

    For the command alone: a library leaves the streams of its program as they are.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            _discard(number)
    if sys.stdin is None:
        sys.stdin = os.fdopen(0, closefd=False)
    if sys.stdout is None:
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    elif isinstance(sys.stdout.buffer, io.RawIOBase):
        # With PYTHONUNBUFFERED, what is written in part is lost without an error.
        how = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
        sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False, **how)
    sys.stderr = Guarded(2)


def discard_output() -> None:
    """Nothing more can be said on stdout, not even what is flushed at exit."""
    _discard(1)


def _discard(number: int) -> None:
    opened = os.open(os.devnull, os.O_RDWR)
    if opened == number:
        os.set_inheritable(number, True)
        return
    os.dup2(opened, number)
    os.close(opened)


class Guarded(io.TextIOWrapper):
    """Text to a descriptor, without secrets; what cannot be written is dropped."""

    def __init__(self, number: int) -> None:
        raw = io.BufferedWriter(_Unfailing(number, "w", closefd=False))
        super().__init__(raw, "utf-8", "backslashreplace", line_buffering=True)

    def write(self, text: str) -> int:
        """Write a text that is whole: secrets are found within one call."""
        super().write(scrub(text))
        return len(text)


class _Unfailing(io.FileIO):
    def write(self, content: object) -> int:
        """Bytes taken: all, whether or not there is room for them."""
        view = memoryview(content)  # pyright: ignore[reportArgumentType]
        try:
            return super().write(view) or view.nbytes
        except OSError:
            return view.nbytes

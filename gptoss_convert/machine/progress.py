"""Progress: a bar on a terminal, a line now and then elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Protocol, TextIO

from gptoss_convert.errors.secrets import scrub
from gptoss_convert.machine.terminal import is_dumb, printable

Advance = Callable[[int], None]
_EVERY = 5.0
"""Seconds between two lines where there is no terminal."""


class Progress(Protocol):
    """What long work tells the person who waits for it."""

    def note(self, text: str) -> None:
        """One line that the person should read."""
        ...

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        """Work of this many bytes; the callable takes the bytes of each finished step.

        Where no bytes are to be counted (0), the steps are.
        """
        ...


class _Silent:
    def note(self, text: str) -> None:
        pass

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        yield lambda done: None


SILENT: Progress = _Silent()


class Lines:
    """A line every few seconds, for logs: on stderr, or another stream."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def note(self, text: str) -> None:
        """Print a line."""
        _log(f"note: {printable(text)}", self._stream)

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        """Print `what  37 %  120/459 steps  5.2/13.8 GB  1650 MB/s  eta 5 s` at intervals."""
        began = last = time.monotonic()
        done = count = 0
        lock = threading.Lock()

        def advance(step_bytes: int) -> None:
            nonlocal done, count, last
            with lock:
                done += step_bytes
                count += 1
                now = time.monotonic()
                if now - last >= _EVERY:
                    last = now
                    _log(_line(what, done, nbytes, count, steps, now - began), self._stream)

        yield advance


def _log(line: str, stream: TextIO | None = None) -> None:
    """Print to stderr or a log; that it cannot be written there does not end the work."""
    with suppress(OSError):
        print(scrub(line), file=stream or sys.stderr)


def _line(what: str, done: int, nbytes: int, count: int, steps: int, seconds: float) -> str:
    if not nbytes:
        left = seconds / count * (steps - count)
        return f"{what}  {count / steps:.0%}  {count}/{steps} steps  eta {left:.0f} s"
    rate = done / max(seconds, 1e-9)
    left = (nbytes - done) / max(rate, 1.0)
    return (
        f"{what}  {done / max(nbytes, 1):.0%}  {count}/{steps} steps  {done / 1e9:.1f}/"
        f"{nbytes / 1e9:.1f} GB  {rate / 1e6:.0f} MB/s  eta {left:.0f} s"
    )


class Bar(Lines):
    """A live bar on a terminal."""

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        """Show a rich progress bar with bytes, rate and time left."""
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        columns = (
            TextColumn(what),
            BarColumn(),
            TextColumn("{task.fields[done]}/{task.fields[steps]} steps"),
            *((DownloadColumn(), TransferSpeedColumn()) if nbytes else ()),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=nbytes or steps, done=0, steps=steps)
            count = itertools.count(1)

            def advance(step_bytes: int) -> None:
                bar.update(task, advance=step_bytes if nbytes else 1, done=next(count))

            yield advance


class Both:
    """Tells the person and a log."""

    def __init__(self, *told: Progress) -> None:
        self._told = told

    def note(self, text: str) -> None:
        """One line to each."""
        for progress in self._told:
            progress.note(text)

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        """The same phase for each."""
        with ExitStack() as stack:
            phases = [stack.enter_context(p.phase(what, nbytes, steps)) for p in self._told]

            def advance(done: int) -> None:
                for each in phases:
                    each(done)

            yield advance


def for_rank(quiet: bool, rank: int, log: TextIO | None) -> Progress:
    """Rank 0 tells the person, the others nobody; each keeps its log."""
    told = for_terminal(quiet) if rank == 0 else SILENT
    return Both(told, Lines(log)) if log else told


def for_terminal(quiet: bool) -> Progress:
    """The progress that fits stderr."""
    if quiet:
        return SILENT
    return Bar() if sys.stderr.isatty() and not is_dumb() else Lines()

"""Progress: a bar on a terminal, a line now and then elsewhere, nothing when asked to be quiet."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from gptoss_convert.pages import is_dumb, printable

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
        """Work of this many bytes; the callable takes the bytes of each finished step."""
        ...


class _Silent:
    def note(self, text: str) -> None:
        pass

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        yield lambda done: None


SILENT: Progress = _Silent()


class Lines:
    """A line every few seconds, for logs."""

    def note(self, text: str) -> None:
        """Print to stderr."""
        _log(f"note: {printable(text)}")

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
                    _log(_line(what, done, nbytes, count, steps, now - began))

        yield advance


def _log(line: str) -> None:
    """Print to stderr; that whoever read it has left does not end the work."""
    with suppress(BrokenPipeError):
        print(line, file=sys.stderr)


def _line(what: str, done: int, nbytes: int, count: int, steps: int, seconds: float) -> str:
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
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=nbytes, done=0, steps=steps)
            count = itertools.count(1)

            def advance(step_bytes: int) -> None:
                bar.update(task, advance=step_bytes, done=next(count))

            yield advance


def for_terminal(quiet: bool) -> Progress:
    """The progress that fits stderr."""
    if quiet:
        return SILENT
    return Bar() if sys.stderr.isatty() and not is_dumb() else Lines()

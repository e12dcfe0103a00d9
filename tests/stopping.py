"""Runs that something happens to under way, and the command line in a forked child."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert import __main__ as entry
from gptoss_convert.machine import progress
from gptoss_convert.machine.progress import Advance


class HaltError(BaseException):
    """What a test raises to stop a run."""


def halt() -> None:
    raise HaltError


@dataclass
class At:
    """Progress that does something once, when so many steps are done."""

    steps: int
    what: Callable[[], object]

    def __post_init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def phase(self, what: str, nbytes: int, steps: int) -> Iterator[Advance]:
        done = 0

        def advance(_: int) -> None:
            nonlocal done
            done += 1
            if what == "converting" and done == self.steps:
                self.what()

        yield advance


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    status: int
    error: str
    """What it wrote to stderr."""


def command(
    *words: str | Path,
    at: At | None = None,
    before: Callable[[], object] = lambda: None,
) -> Ended:
    """Run a command line in a forked child, with its signal handlers and exit status."""
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            os.dup2(errors.fileno(), 2)
            os.dup2(output.fileno(), 1)
            _child(["gptoss-convert", *map(str, words)], at, before)
        _, status = os.waitpid(child, 0)
        errors.seek(0)
        return Ended(os.waitstatus_to_exitcode(status), errors.read().decode())


def _child(words: Sequence[str], at: At | None, before: Callable[[], object]) -> None:
    status = 99
    try:
        sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
        sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
        sys.argv[:] = words
        before()
        if at is not None:
            progress.for_terminal = lambda quiet: at
        entry.main()
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 98
    finally:
        sys.stdout.flush()
        os._exit(status)

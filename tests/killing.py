"""Conversions killed by SIGKILL at a chosen system call, in a child that is forked while warm.

The hook stands here and not in the product: in the child, the functions of `os` that write, sync,
rename, create or remove count themselves, and the process kills itself before the n-th such call,
or when half of the bytes of a write are written.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import Conversion, plan
from gptoss_convert.conversion.run import run
from gptoss_convert.engine import execute
from gptoss_convert.machine import threads as workers
from gptoss_convert.synth.synth import synth

COUNTED = ("pwrite", "fsync", "ftruncate", "rename", "replace", "unlink", "rmdir", "mkdir")
FORMATS = {
    "hf-mxfp4": Options("hf", "mxfp4", workers=1),
    "hf-bf16": Options("hf", "bf16", workers=1),
    "openai": Options("openai", workers=1),
    "megatron": Options("megatron", workers=1),
}
PAIRS = [(source, target) for source in FORMATS for target in FORMATS]


class Countdown:
    """Counts the calls; kills the process at the chosen one."""

    def __init__(self, kill_at: int) -> None:
        self._left = kill_at
        self.count = 0
        self._lock = threading.Lock()

    def pass_point(self) -> None:
        with self._lock:
            self.count += 1
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        """Replace the functions of `os`; for a child that is going to end."""
        for name in COUNTED:
            setattr(os, name, self._counting(name, getattr(os, name)))
        opened = os.open

        @functools.wraps(opened)
        def open_(path: Any, flags: int, *rest: Any, **named: Any) -> int:
            if flags & os.O_CREAT:
                self.pass_point()
            return opened(path, flags, *rest, **named)

        os.open = open_

    def _counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def counting(*arguments: Any, **named: Any) -> Any:
            self.pass_point()
            if name != "pwrite":
                return function(*arguments, **named)
            descriptor, content, offset = arguments
            # Direct writes must stay whole pages, so that the half is written at all.
            half = len(content) // 2 // 4096 * 4096 or len(content) // 2
            function(descriptor, content[:half], offset)
            self.pass_point()
            return half + function(descriptor, content[half:], offset + half)

        return counting


def one_by_one(
    numbers: Iterable[int],
    new_worker: Callable[[], workers.Task[Any]],
    *,
    workers: int,
    finished: Callable[[list[Any]], None],
    advance: Callable[[int], None],
    interrupt: Callable[[], None] = lambda: None,
    every: float = 2.0,
) -> None:
    """Stands for `run_all`: the journal is written after each step, so every run is the same."""
    work = new_worker()
    for number in numbers:
        result, _ = work(number)
        finished([result])


def killed(conversion: Conversion, kill_at: int) -> bool:
    """Run a conversion in a child that is killed at a point; False if it came to its end."""
    child = os.fork()
    if child == 0:
        _child(conversion, Countdown(kill_at))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.WEXITSTATUS(status) == 0, "the child failed by itself"
    return False


def _child(conversion: Conversion, countdown: Countdown) -> NoReturn:
    try:
        execute.run_all = one_by_one  # type: ignore[assignment]
        countdown.install()
        run(conversion)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def points(conversion: Conversion) -> int:
    """How many points an uninterrupted run passes; removes its target again."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        countdown = Countdown(0)
        exit_ = os._exit

        def report(status: int) -> NoReturn:
            os.write(writer, countdown.count.to_bytes(8, "little"))
            exit_(status)

        os._exit = report
        _child(conversion, countdown)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        count = int.from_bytes(pipe.read(8), "little")
    shutil.rmtree(conversion.target)
    return count


def contents(directory: Path) -> dict[str, bytes]:
    """Every file of a directory, by relative path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@contextmanager
def quick_folder() -> Iterator[Path]:
    """A folder in memory where there is one: syncing to a disk takes most of the time."""
    shared = Path("/dev/shm")
    place = shared if os.access(shared, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="gptoss-kill-", dir=place) as folder:
        yield Path(folder)


def prepare(folder: Path, source: str, target: str) -> Conversion:
    """A planned conversion of one synthetic layer from one format to another."""
    made = folder / source
    if not made.exists():
        dtype = "bf16" if source == "hf-bf16" else "keep"
        synth(made, layers=1, format=source.partition("-")[0], dtype=dtype)
    return plan(made, folder / f"{source}-to-{target}", FORMATS[target])


def check_point(conversion: Conversion, kill_at: int, expected: dict[str, bytes]) -> bool:
    """Kill at a point and run again; whether it was reached. TARGET is removed in the end."""
    target = conversion.target
    reached = killed(conversion, kill_at)
    if target.exists():
        assert contents(target) == expected, f"point {kill_at}: TARGET is there, not complete"
    if reached:
        run(conversion)
    assert contents(target) == expected, f"point {kill_at}: the second run wrote other bytes"
    left = [path.name for path in target.parent.iterdir() if path.name.startswith(".")]
    assert not left, f"point {kill_at}: {left} left behind"
    shutil.rmtree(target)
    return reached

"""Symmetric workers: threads that each take the next number from one queue until it is empty."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import TypeVar

Result = TypeVar("Result")
Task = Callable[[int], tuple[Result, int]]
"""Does the step of a number; returns its result and the bytes it moved."""


def require_threads(count: int) -> None:
    """Raise RuntimeError, as Python does, unless so many more threads can be started.

    Libraries do not ask: OpenMP ends the process with status 1 where one does not start.
    """
    leave = threading.Event()
    started: list[threading.Thread] = []
    try:
        for _ in range(count):
            thread = threading.Thread(target=leave.wait, daemon=True)
            thread.start()
            started.append(thread)
    finally:
        leave.set()
        for thread in started:
            thread.join()


def run_all(
    numbers: Iterable[int],
    new_worker: Callable[[], Task[Result]],
    *,
    workers: int,
    finished: Callable[[list[Result]], None],
    advance: Callable[[int], None],
    interrupt: Callable[[], None] = lambda: None,
    every: float = 2.0,
) -> None:
    """Do every number once; `finished` gets the results of about `every` seconds, in this thread.

    The first error stops all workers after their current step and is raised here, when everything
    done has been handed over. `advance` is called from the workers with the bytes moved.
    `interrupt` frees workers that wait for anything, once no further step is to begin.
    """
    queue = iter(numbers)
    lock = threading.Lock()
    stop = threading.Event()
    done: list[Result] = []
    errors: list[BaseException] = []

    def loop() -> None:
        try:
            work = new_worker()
            while not stop.is_set():
                with lock:
                    number = next(queue, None)
                if number is None:
                    return
                result, nbytes = work(number)
                with lock:
                    done.append(result)
                advance(nbytes)
        except BaseException as error:
            errors.append(error)
            stop.set()
            interrupt()

    def hand_over() -> None:
        with lock:
            batch = done[:]
            done.clear()
        if batch:
            finished(batch)

    threads = [threading.Thread(target=loop, name=f"worker-{i}") for i in range(workers)]
    started: list[threading.Thread] = []
    try:
        for thread in threads:
            started.append(thread)
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(every)
                if thread.is_alive():
                    hand_over()
    finally:
        stop.set()
        interrupt()
        for thread in started:
            if thread.ident is not None:
                thread.join()
        hand_over()
    if errors:
        raise errors[0]

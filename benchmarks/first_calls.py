"""Do vector functions give other bits when threads call them for the first time?

`python -m benchmarks.first_calls [PROCESSES]`: each process computes cosines twice, on several
threads, as the first that it computes at all; then the same after `settle_kernels`. More processes
at once than processors, so that threads are interrupted at any moment. Differences are expected
from oneMKL 2024.2 on Intel processors only.
"""

from __future__ import annotations

import os
import sys

import torch

from gptoss_convert.witness.first_calls import settle_kernels

ANGLES = 4097 * 32
"""A rotary table of 4,097 positions."""


def difference(settled: bool) -> float:
    """The largest difference between the first and the second time, in this process."""
    if settled:
        settle_kernels()
    angles = torch.arange(ANGLES, dtype=torch.float32) / 32
    first, second = angles.cos(), angles.cos()
    return float((first - second).abs().max())


def storm(processes: int, settled: bool) -> list[float]:
    """The differences of so many processes, four per processor at a time."""
    found: list[float] = []
    at_once = 4 * (os.cpu_count() or 1)
    while len(found) < processes:
        pipes = [_child(settled) for _ in range(min(at_once, processes - len(found)))]
        for child, pipe in pipes:
            with os.fdopen(pipe) as stream:
                found.append(float(stream.read()))
            os.waitpid(child, 0)
    return found


def _child(settled: bool) -> tuple[int, int]:
    reading, writing = os.pipe()
    if child := os.fork():
        os.close(writing)
        return child, reading
    os.write(writing, repr(difference(settled)).encode())
    os._exit(0)


def main() -> None:
    processes = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    for settled in (False, True):
        found = storm(processes, settled)
        wrong = sum(one > 0 for one in found)
        label = "settled" if settled else "as torch does it"
        print(f"{label}: {wrong} of {processes} differ, by up to {max(found):.3g}", flush=True)


if __name__ == "__main__":
    main()

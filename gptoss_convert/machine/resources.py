"""What the machine allows: memory, processors, free disk space."""

from __future__ import annotations

import mmap
import os
import resource
from pathlib import Path

from gptoss_convert.errors import DiskError, ResourceError

BASE_BYTES = 66_000_000
"""Resident memory before any plan and buffer: the interpreter, numpy, compiled kernels, threads."""
USUAL_BYTES = 400_000_000
"""What a program may take without being asked."""


def memory_limit() -> int:
    """Bytes this process may use: the smallest of physical memory, cgroup and RLIMIT_AS limits."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    if soft != resource.RLIM_INFINITY:
        limits.append(soft)
    limits += _cgroup_limits()
    return min(limits)


def require_room(nbytes: int) -> None:
    """Raise ResourceError unless so much address space is left: libraries do not ask, they abort,
    or end the process with a status of their own."""
    try:
        mmap.mmap(-1, nbytes).close()
    except OSError:
        soft, _ = resource.getrlimit(resource.RLIMIT_AS)
        raise ResourceError(
            f"{nbytes / 1e6:.0f} MB more address space needed, the limit is {soft / 1e6:.0f} MB; "
            "raise ulimit -v"
        ) from None


def _cgroup_limits() -> list[int]:
    two, one = Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/memory")
    paths = [two / "memory.max", one / "memory.limit_in_bytes"]
    try:
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            first = "memory" in controllers.split(",")
            root, file = (one, "memory.limit_in_bytes") if first else (two, "memory.max")
            group = root / name.lstrip("/")
            paths += [folder / file for folder in (group, *group.parents)]
    except (OSError, ValueError):
        pass
    limits = []
    for path in paths:
        try:
            limits.append(int(path.read_text()))
        except (OSError, ValueError):
            continue
    return limits


def peak_memory() -> int:
    """The largest resident size of this process so far, in bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split(None, 1)[0]) * 1024
    except (OSError, IndexError, ValueError):
        pass
    # Counts the program that this process was before exec, too.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def choose_workers(
    buffer_bytes: int,
    max_memory: int | None,
    workers: int | None,
    processes: int = 1,
    shared_bytes: int = 0,
) -> int:
    """How many workers fit into `max_memory`; raises ResourceError if not even one does.

    Without a wish: two more than there are processors, at most 16, as more only wait for the disk,
    and only as many as the usual memory holds. So many `processes` share the machine's memory and
    processors; the workers share `shared_bytes`.
    """
    limit = memory_limit() // processes
    wanted = max_memory
    if wanted is None:
        wanted = limit if workers else USUAL_BYTES
    allowed = min(wanted, limit)
    base = BASE_BYTES + shared_bytes
    fit = (allowed - base) // max(buffer_bytes, 1)
    if fit < 1:
        has = f"{allowed / 1e6:.0f} MB" if allowed >= 1e6 else f"{allowed} bytes"
        whose = "the machine or its container allows" if allowed == limit else "--max-memory is"
        raise ResourceError(f"one worker needs {(base + buffer_bytes) / 1e6:.0f} MB, {whose} {has}")
    cores = len(os.sched_getaffinity(0)) // processes
    return int(min(workers or min(cores + 2, 16), fit))


def check_disk(folder: Path, needed: int) -> None:
    """Refuse to start what cannot fit; raises DiskError with both numbers."""
    state = os.statvfs(folder)
    free = state.f_bavail * state.f_frsize
    if needed > free:
        raise DiskError(
            f"{folder}: {_amount(needed)} needed, {_amount(free)} free; free some space"
        )


def _amount(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"

"""Buffers for direct I/O: what the kernel knows of their memory; what is synced and when."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest

from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.files import TargetFiles


def flags_of(address: int) -> list[str]:
    """The flags of the mapping that an address of this process lies in, as proc(5) spells them."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if found := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(found[1], 16) <= address < int(found[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:#x}")


@pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no huge pages in this kernel"
)
def test_a_buffer_may_have_huge_pages_and_no_fork_copies_it() -> None:
    """In shared memory the advice for huge pages is accepted, too, and has no effect."""
    arena = Arena(64 << 20)
    flags = flags_of(np.frombuffer(arena.memory, np.uint8).ctypes.data)
    assert {"hg", "dc"} <= set(flags)
    assert "sh" not in flags


def test_only_files_that_were_written_since_are_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(file) or fsync(file))
    with TargetFiles(tmp_path) as files:
        for name in ("a", "b", "c"):
            files.create(name, PAGE)
        for writes, expected in (((), 3), ((), 0), (("b",), 1), (("a", "b", "a"), 2), ((), 0)):
            for name in writes:
                files.write_bytes(name, 0, b"x")
            synced.clear()
            files.sync()
            assert len(synced) == expected
        arena = Arena(2 * PAGE)
        files.write("c", 0, PAGE, arena, arena.take(PAGE, 0))
        synced.clear()
        files.sync()
        assert len(synced) == 1

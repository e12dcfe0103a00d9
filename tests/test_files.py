"""Buffers for direct I/O: what the kernel knows of their memory; what is synced and when."""

from __future__ import annotations

import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import IntegrityError
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.target_files import TargetFiles


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


def test_more_files_are_read_than_may_be_open(tmp_path: Path) -> None:
    """Those that nobody reads are closed, and are the same when they are opened again."""
    names = [f"{number:03d}" for number in range(200)]
    for name in names:
        (tmp_path / name).write_bytes(name.encode() * 10)
    arena = Arena(2 * PAGE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(one.name) for one in Path("/proc/self/fd").iterdir()) + 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, before[1]))
    try:
        with SourceFiles() as files:
            for name in (*names, *names):
                arena.reset(2 * PAGE)
                files.read(FileRef(tmp_path, name), 0, 20, arena, arena.take(20, 0))
                assert arena.memory[:3] == name.encode()
            files.require_unchanged()
            (tmp_path / "003").write_bytes(b"other" * 6)
            with pytest.raises(IntegrityError, match="003: changed since"):
                for name in names:
                    files.read(FileRef(tmp_path, name), 0, 20, arena, 0)
            with pytest.raises(IntegrityError, match="003: changed while"):
                files.require_unchanged()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)

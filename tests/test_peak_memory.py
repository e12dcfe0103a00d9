"""The memory that is reported is this program's own, and what is taken unasked is bounded."""

import subprocess
import sys

import pytest

from gptoss_convert.errors import ResourceError
from gptoss_convert.machine import resources
from gptoss_convert.machine.resources import choose_workers

PARENT = """
import subprocess, sys
ballast = b"x" * 400_000_000
child = "from gptoss_convert.machine.resources import peak_memory; print(peak_memory())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""


def test_a_large_parent_does_not_count() -> None:
    said = subprocess.run([sys.executable, "-c", PARENT], capture_output=True, text=True)
    assert 1_000_000 < int(said.stdout) < 300_000_000


def test_a_large_machine_takes_no_more_memory_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(64))
    monkeypatch.setattr(resources, "memory_limit", lambda: 10**12)
    expert, packed = 43_000_000, 18_000_000
    assert choose_workers(expert, None, None) == 7
    assert choose_workers(expert, None, None, shared_bytes=70_000_000) == 6
    assert choose_workers(packed, None, None) == 16
    assert choose_workers(expert, 10**9, None) == 16
    assert choose_workers(expert, None, 24) == 24
    assert choose_workers(expert, 300_000_000, 24) == 5
    monkeypatch.setattr(resources.os, "sched_getaffinity", lambda _: range(2))
    assert choose_workers(packed, None, None) == 4


def test_who_allows_too_little_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "memory_limit", lambda: 100_000_000)
    for workers in (None, 3):
        with pytest.raises(ResourceError, match="109 MB, the machine or its container allows 100"):
            choose_workers(43_000_000, None, workers)
    for most, said in ((95_000_000, "95 MB"), (0, "0 bytes")):
        with pytest.raises(ResourceError, match=f"109 MB, --max-memory is {said}"):
            choose_workers(43_000_000, most, 3)

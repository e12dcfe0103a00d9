"""Reading a journal takes the room of the journal, not of the largest allowed."""

import tracemalloc
from pathlib import Path

from gptoss_convert.conversion.journal import Journal


def test_a_small_journal_takes_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.touch()
    with path.open("r+b") as file:
        tracemalloc.start()
        Journal(file.fileno(), "journal", {"options": {}})
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 10_000_000

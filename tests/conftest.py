"""Set before anything imports torch: tiny tensors on several threads cost many times their work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptoss_convert.codecs.mxfp4 import library

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Compile this checkout's kernels if they are older than their source."""
    if library.is_stale() and not hasattr(config, "workerinput"):
        build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        subprocess.run(build, cwd=Path(__file__).parent.parent, check=True)


_LONG = (
    "test_verify_ranks.py",
    "test_docs.py",
    "test_several_ranks.py",
    "test_megatron_training.py",
    "test_bridge_runs.py",
    "test_kill.py",
    "test_megatron_parallel.py",
    "test_verify_oracle.py",
)
"""Files that take longest, begun first: else one process would be left with them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order files so that several processes end at about the same time; within them, as written."""
    place = {name: n for n, name in enumerate(_LONG)}
    items.sort(key=lambda item: place.get(item.path.name, len(_LONG)))

"""Launching ranks as torchrun does, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Launch:
    """How a launch ended."""

    status: int
    output: str
    """What the ranks printed to stdout."""
    error: str
    """Their stderr, and torchrun's own words."""


def torchrun(
    processes: int,
    *words: str | Path,
    folder: Path,
    more: Mapping[str, str] | None = None,
    meanwhile: Callable[[], object] = lambda: None,
) -> Launch:
    """Run `torchrun --standalone --nproc-per-node PROCESSES WORDS` in a folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    with subprocess.Popen(
        [*launcher, "--nproc-per-node", str(processes), *map(str, words)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(more or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as launched:
        meanwhile()
        output, error = launched.communicate(timeout=300)
    return Launch(launched.returncode, output, error)

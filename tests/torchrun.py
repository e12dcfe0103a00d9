"""Launching ranks as torchrun does, on this machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
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
    processes: int, *words: str | Path, folder: Path, more: Mapping[str, str] | None = None
) -> Launch:
    """Run `torchrun --standalone --nproc-per-node PROCESSES WORDS` in a folder."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **(more or {})}
    done = subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), *map(str, words)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    return Launch(done.returncode, done.stdout, done.stderr)

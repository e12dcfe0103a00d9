"""How long a conversion will take on this disk, measured on a few megabytes."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.errors import DiskError, IntegrityError
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.target_files import TargetFiles

SAMPLE = 64 << 20
"""Bytes read from SOURCE and written beside TARGET."""


def estimate_seconds(conversion: Conversion) -> float | None:
    """Seconds to move the plan's bytes at the disk's speed of now, None if it cannot be measured.

    Both directions share a disk, so their times add up. The sample that is written is deleted.
    """
    arena = Arena(SAMPLE)
    try:
        read = _read_rate(conversion, arena)
        written = _write_rate(conversion.target.parent, arena)
    except (OSError, DiskError, IntegrityError):
        return None
    return conversion.plan.read_bytes / read + conversion.write_bytes / written


def _read_rate(conversion: Conversion, arena: Arena) -> float:
    """Bytes per second from the largest file of SOURCE."""
    root = conversion.source.root
    sizes = {c.file: (root / c.file).stat().st_size for c in conversion.source.chunks}
    name, size = max(sizes.items(), key=lambda item: item[1])
    nbytes = min(size, SAMPLE)
    began = time.monotonic()
    with SourceFiles() as files:
        files.read(FileRef(root, name), 0, nbytes, arena, 0)
    return nbytes / max(time.monotonic() - began, 1e-6)


def _write_rate(folder: Path, arena: Arena) -> float:
    """Bytes per second into a file beside TARGET, synced."""
    with tempfile.TemporaryDirectory(prefix=".gptoss-convert-", dir=folder) as place:
        began = time.monotonic()
        with TargetFiles(Path(place)) as files:
            files.create("sample", SAMPLE)
            files.write("sample", 0, SAMPLE, arena, 0)
            files.sync()
        return SAMPLE / max(time.monotonic() - began, 1e-6)

"""The files of the work directory: created in full size before any step, completed after all."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from gptoss_convert.conversion import manifest
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.engine.execute import written_ranges
from gptoss_convert.engine.records import Done
from gptoss_convert.errors.secrets import nameable
from gptoss_convert.machine.small_files import pieces, write_file
from gptoss_convert.machine.target_files import TargetFiles


def create(conversion: Conversion, files: TargetFiles) -> None:
    """Every file in its final size, with the bytes that no step writes, before any step."""
    there = any(map(os.path.lexists, (files.root / f.name for f in conversion.image.files)))
    gaps = _gaps(conversion) if there else {}
    for file in conversion.image.files:
        files.create(file.name, file.size)
        for offset, content in file.fixed:
            files.write_bytes(file.name, offset, content)
        for offset, length in gaps.get(file.name, ()):
            files.write_zeros(file.name, offset, length)
    files.sync()


def _gaps(conversion: Conversion) -> Mapping[str, list[tuple[int, int]]]:
    """By file, (offset, length) of what nobody writes: zeros, whatever an interrupted run left."""
    written: dict[str, list[tuple[int, int]]] = {
        file.name: [(at, len(content)) for at, content in file.fixed]
        for file in conversion.image.files
    }
    for step in conversion.plan.steps:
        for name, offset, length in written_ranges(step):
            written[name].append((offset, length))
    gaps: dict[str, list[tuple[int, int]]] = {}
    for file in conversion.image.files:
        end = 0
        for offset, length in (*sorted(written[file.name]), (file.size, 0)):
            if offset > end:
                gaps.setdefault(file.name, []).append((end, offset - end))
            end = max(end, offset + length)
    return gaps


def open_for(conversion: Conversion, files: TargetFiles, numbers: Iterable[int]) -> None:
    """The files that these steps write, which rank 0 has created."""
    steps = (conversion.plan.steps[number] for number in numbers)
    names = {extent.file.name for step in steps for extent in step.targets}
    for file in conversion.image.files:
        if file.name in names:
            files.create(file.name, file.size)


def complete(conversion: Conversion, work: Path, done: Mapping[int, Done]) -> int:
    """Write the small files, the manifest among them; returns the manifest's CRC-32."""
    header = {
        k: v for k, v in conversion.header.items() if k in {"tool", "plan", "from", "to", "adapter"}
    }
    small = {
        name: write_file(work, name, pieces(content, conversion.places))
        for name, content in conversion.image.closing
    }
    content = manifest.manifest(nameable(header), conversion.image, conversion.plan, done, small)
    return write_file(work, manifest.NAME, [content])


def held_bytes(work: Path) -> int:
    """Bytes of disk that an interrupted run's files already hold."""
    return sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())

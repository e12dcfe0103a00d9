"""Which steps of an interrupted run are still on the disk as its journal says."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.conversion.publish import work_path
from gptoss_convert.engine.execute import written_ranges
from gptoss_convert.engine.records import Done, Region
from gptoss_convert.errors import DiskError, IntegrityError
from gptoss_convert.machine.files import Arena, SourceFiles
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import Ranks


def intact(
    conversion: Conversion, recorded: Mapping[int, Done], progress: Progress, ranks: Ranks
) -> dict[int, Done]:
    """The recorded steps whose bytes are there, the same on every rank; each reads back a part."""
    steps = conversion.plan.steps
    known = {
        number: done
        for number, done in recorded.items()
        if number < len(steps) and _places(done) == written_ranges(steps[number])
    }
    if not known or conversion.options.trust_journal:
        return known
    progress.note(f"going on: {len(known)} of {len(steps)} steps were done before")
    mine = {number: known[number] for number in sorted(known)[ranks.rank :: ranks.size]}
    lost = {number for part in ranks.gather(_lost(conversion, mine, progress)) for number in part}
    if lost:
        progress.note(f"{len(lost)} steps are no longer as they were written: doing them again")
    return {number: done for number, done in known.items() if number not in lost}


def _lost(conversion: Conversion, known: Mapping[int, Done], progress: Progress) -> list[int]:
    total = sum(region.length for done in known.values() for region in done.regions)
    lost: list[int] = []
    work = work_path(conversion.target)
    with (
        SourceFiles() as files,
        progress.phase("checking what is there", total, len(known)) as advance,
    ):
        arena = Arena(conversion.plan.buffer_bytes)
        for number, done in known.items():
            if not all(same_bytes(files, work, region, arena) for region in done.regions):
                lost.append(number)
            advance(sum(region.length for region in done.regions))
    return lost


def _places(done: Done) -> set[tuple[str, int, int]]:
    return {(region.file, region.offset, region.length) for region in done.regions}


def same_bytes(files: SourceFiles, work: Path, region: Region, arena: Arena) -> bool:
    """Whether a region is on the disk as it was written."""
    try:
        return (
            files.crc(FileRef(work, region.file), region.offset, region.length, arena) == region.crc
        )
    except (IntegrityError, DiskError):
        return False

"""Which steps of an interrupted run are still on the disk as its journal says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.conversion.target import work_path
from gptoss_convert.engine.execute import written_ranges
from gptoss_convert.engine.records import Done, Region
from gptoss_convert.engine.steps import Step
from gptoss_convert.errors import DiskError, IntegrityError
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.files import SourceFiles
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
        if 0 <= number < len(steps) and _plausible(steps[number], done)
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


def _plausible(step: Step, done: Done) -> bool:
    """Whether a line with a right checksum can be what this step left: else it is done again."""
    recipe = step.recipe
    valued = step.family.weight in recipe.makes or recipe.has_values or recipe.encoding is not None
    return (
        _places(done) == written_ranges(step)
        and (done.fingerprint is not None) == valued
        and _natural(asdict(replace(done, encoded=replace(done.encoded, first_inexact=0))))
        and bool(done.anomalies.first) == bool(done.anomalies.nonfinite)
        and all(region.crc < 1 << 32 for region in done.regions)
    )


def _natural(value: object) -> bool:
    """Whether there is no number below 0, at any depth."""
    if isinstance(value, dict):
        return all(map(_natural, value.values()))
    if isinstance(value, tuple | list):
        return all(map(_natural, value))
    return not isinstance(value, int | float) or value >= 0


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

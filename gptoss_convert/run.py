"""Running a planned conversion: execute, record, publish; go on where a run was stopped."""

from __future__ import annotations

import math
import time
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptoss_convert import manifest, oddities, resources
from gptoss_convert.conversion import Conversion, plan
from gptoss_convert.errors import CodecError, DiskError, IntegrityError
from gptoss_convert.execute import Done, Region, execute, places
from gptoss_convert.files import Arena, ByteSource, SourceFiles, TargetFiles, write_file
from gptoss_convert.fingerprint import ScaleStatistics
from gptoss_convert.folding import fold
from gptoss_convert.hub.stream import ShardStream
from gptoss_convert.journal import Journal
from gptoss_convert.mxfp4 import EncodeStats
from gptoss_convert.options import Options
from gptoss_convert.progress import SILENT, Progress
from gptoss_convert.publish import Workspace, check_absent, workspace


@dataclass
class Outcome:
    """What the steps of one weight did beyond moving bits."""

    encoded: EncodeStats = field(default_factory=EncodeStats)
    scales: ScaleStatistics = field(default_factory=ScaleStatistics)
    cast_values: int = 0


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    conversion: Conversion
    seconds: float
    peak_memory: int
    resumed_steps: int
    """Steps that an interrupted run had finished before."""
    outcomes: Mapping[str, Outcome]
    """By weight."""

    def summary(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            **self.conversion.summary(),
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory,
            "resumed_steps": self.resumed_steps,
            "outcomes": {
                weight: {"cast_values": o.cast_values, **asdict(o.encoded)}
                for weight, o in self.outcomes.items()
                if o.encoded.blocks or o.cast_values
            },
        }


def convert(
    source: str | Path, target: str | Path, options: Options, progress: Progress = SILENT
) -> Report:
    """Convert SOURCE to TARGET; TARGET appears complete or not at all."""
    return run(plan(source, target, options), progress)


def run(
    conversion: Conversion, progress: Progress = SILENT, source: ByteSource | None = None
) -> Report:
    """Execute a planned conversion; `source` stands in for the files that the plan reads.

    Raises CodecError if a value has no MXFP4 form and `lossy` was not asked for: what would be lost
    is stated, by weight, in its message.
    """
    if source is None and conversion.source.repository is not None:
        from gptoss_convert.hub.fetch import fetched

        with fetched(conversion, progress) as (ready, stream):
            return _run(ready, progress, stream)
    return _run(conversion, progress, source)


def _run(conversion: Conversion, progress: Progress, source: ByteSource | None) -> Report:
    began = time.monotonic()
    for note in conversion.notes:
        progress.note(note)
    with workspace(conversion.target, conversion.options.restart) as space:
        journal = Journal(space.journal, str(conversion.target), conversion.header)
        if journal.published is not None and _is_published(space, journal.published):
            space.finish()
            done = before = journal.done
        else:
            if not conversion.options.overwrite:
                check_absent(conversion.target)
            space.open()
            before = _intact(conversion, space, journal, progress)
            needed = conversion.write_bytes - _held(space.work)
            resources.check_disk(conversion.target.parent.resolve(), needed)
            done = _execute(conversion, space, journal, before, progress, source)
            _state_losses(conversion, _outcomes(conversion, done.values()), progress)
            journal.publishing(_close(conversion, space.work, done))
            space.publish()
    outcomes = _outcomes(conversion, done.values())
    seconds = time.monotonic() - began
    return Report(conversion, seconds, resources.peak_memory(), len(before), outcomes)


def _close(conversion: Conversion, work: Path, done: Mapping[int, Done]) -> int:
    """Write the small files, the manifest among them; returns the manifest's CRC-32."""
    header = {k: v for k, v in conversion.header.items() if k in {"tool", "plan", "from", "to"}}
    content = manifest.manifest(header, conversion.image, conversion.plan, done)
    for name, text in ((manifest.NAME, content), *conversion.image.closing):
        write_file(work / name, text)
    return zlib.crc32(content)


def _is_published(space: Workspace, manifest_crc: int) -> bool:
    """Whether an interrupted run had renamed its work to TARGET already."""
    path = space.target / manifest.NAME
    if space.work.exists() or not path.is_file():
        return False
    return zlib.crc32(path.read_bytes()) == manifest_crc


def _execute(
    conversion: Conversion,
    space: Workspace,
    journal: Journal,
    before: Mapping[int, Done],
    progress: Progress,
    source: ByteSource | None,
) -> dict[int, Done]:
    """Run the steps that are not done yet; returns all, those done before included."""
    plan = conversion.plan
    done = dict(before)
    left = [number for number in range(len(plan.steps)) if number not in done]
    total = plan.read_bytes + plan.write_bytes
    with (
        _reading(conversion, source) as sources,
        TargetFiles(space.work) as files,
        progress.phase("converting", total, len(plan.steps)) as advance,
    ):
        stream = sources if isinstance(sources, ShardStream) else None
        for file in conversion.image.files:
            files.create(file.name, file.size)
            for offset, content in file.fixed:
                files.write_bytes(file.name, offset, content)

        def finished(batch: list[Done]) -> None:
            _refuse_nonfinite(conversion, batch)
            # In this order: the journal never speaks of bytes that a crash could take back.
            files.sync()
            journal.append(batch)
            done.update((result.step, result) for result in batch)
            if stream:
                stream.finished(result.step for result in batch)

        execute(
            plan,
            stream.begin(plan, left) if stream else left,
            sources,
            files,
            workers=conversion.workers,
            finished=finished,
            advance=advance,
            interrupt=stream.interrupt if stream else lambda: None,
            every=0.25 if stream else 2.0,
        )
        files.sync()
        if isinstance(sources, SourceFiles):
            sources.require_unchanged()
    _refuse_zeros(conversion, done)
    return done


def _reading(
    conversion: Conversion, source: ByteSource | None
) -> AbstractContextManager[ByteSource]:
    """What the workers read from, for as long as they do."""
    if source is None:
        return SourceFiles(conversion.roots)
    return source if isinstance(source, ShardStream) else nullcontext(source)


def _refuse_nonfinite(conversion: Conversion, batch: Iterable[Done]) -> None:
    for result in batch:
        if result.oddities.nonfinite and not conversion.options.allow_nonfinite:
            raise IntegrityError(
                f"{conversion.source.place}: {result.oddities.first}; "
                "pass --allow-nonfinite to keep such values"
            )


def _refuse_zeros(conversion: Conversion, done: Mapping[int, Done]) -> None:
    found = {number: result.oddities for number, result in done.items()}
    zeros = oddities.zero_matrices(conversion.plan, found)
    weights = [matrix for matrix in zeros if not oddities.is_vector(matrix[0])]
    if weights and not conversion.options.allow_zero:
        raise IntegrityError(
            f"{conversion.source.place}: {len(weights)} weight matrices are zero throughout, in "
            f"{fold(oddities.tensors_of(conversion.plan, weights))}; "
            "pass --allow-zero to keep them"
        )


def _intact(
    conversion: Conversion, space: Workspace, journal: Journal, progress: Progress
) -> dict[int, Done]:
    """The steps of an interrupted run whose bytes are still as the journal says."""
    steps = conversion.plan.steps
    known = {
        number: done
        for number, done in journal.done.items()
        if number < len(steps) and _places(done) == places(steps[number])
    }
    if not known or conversion.options.trust_journal:
        return known
    total = sum(region.length for done in known.values() for region in done.regions)
    progress.note(f"going on: {len(known)} of {len(conversion.plan.steps)} steps were done before")
    intact: dict[int, Done] = {}
    with (
        SourceFiles({"": space.work}) as files,
        progress.phase("checking what is there", total, len(known)) as advance,
    ):
        arena = Arena(conversion.plan.buffer_bytes)
        for step, done in known.items():
            if all(_same_bytes(files, region, arena) for region in done.regions):
                intact[step] = done
            advance(sum(region.length for region in done.regions))
    if lost := len(known) - len(intact):
        progress.note(f"{lost} steps are no longer as they were written: doing them again")
    return intact


def _places(done: Done) -> set[tuple[str, int, int]]:
    return {(region.file, region.offset, region.length) for region in done.regions}


def _same_bytes(files: SourceFiles, region: Region, arena: Arena) -> bool:
    try:
        return files.crc(region.file, region.offset, region.length, arena) == region.crc
    except (IntegrityError, DiskError):
        return False


def _held(work: Path) -> int:
    """Bytes of disk that an interrupted run's files already hold."""
    return sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())


def _outcomes(conversion: Conversion, done: Iterable[Done]) -> dict[str, Outcome]:
    outcomes: dict[str, Outcome] = defaultdict(Outcome)
    for result in done:
        outcome = outcomes[conversion.plan.steps[result.step].family.weight]
        outcome.encoded += result.encoded
        outcome.scales += result.scales
        outcome.cast_values += result.cast_values
    return dict(outcomes)


def _state_losses(
    conversion: Conversion, outcomes: Mapping[str, Outcome], progress: Progress
) -> None:
    """Say, by weight, what rounding lost; refuse unless that was asked for."""
    lossy: list[str] = []
    for weight, outcome in outcomes.items():
        if outcome.cast_values:
            progress.note(f"{weight}: {outcome.cast_values} values rounded to BF16")
        stats = outcome.encoded
        if stats.inexact_blocks:
            share = stats.inexact_blocks / stats.blocks
            noise = (
                10 * math.log10(stats.squares / stats.squared_error) if stats.squared_error else 0
            )
            lossy.append(
                f"{weight}: {stats.inexact_blocks} of {stats.blocks} blocks ({share:.1%}) are not "
                f"exact in MXFP4: {stats.inexact_values} values rounded, {stats.clipped} clipped, "
                f"{stats.flushed} flushed to zero, SQNR {noise:.1f} dB"
            )
    if lossy and not conversion.options.lossy:
        raise CodecError(
            f"{conversion.source.place}: {'; '.join(lossy)}; pass --lossy to round, nothing was "
            "written"
        )
    for loss in lossy:
        progress.note(loss)

"""Running a planned conversion: execute, record and publish, or resume an interrupted run."""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_convert.conversion import lossy, manifest
from gptoss_convert.conversion.journal import Journal, Publishing, recorded
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.outcome import (
    outcomes_of,
    refuse_nonfinite,
    refuse_zeros,
    state_losses,
)
from gptoss_convert.conversion.partition import (
    require_kept,
    require_same_plan,
    require_shared,
    shares_of,
    spread,
)
from gptoss_convert.conversion.plan import Conversion, plan
from gptoss_convert.conversion.publish import (
    Workspace,
    check_absent,
    journal_path,
    locked_journal,
    shards_path,
    work_path,
    workspace,
)
from gptoss_convert.conversion.resume import intact
from gptoss_convert.engine.execute import execute, written_ranges
from gptoss_convert.engine.records import Done, Effect
from gptoss_convert.errors import UsageError
from gptoss_convert.errors.secrets import nameable
from gptoss_convert.hub.stream import ShardStream
from gptoss_convert.machine import resources
from gptoss_convert.machine.files import ByteSource, SourceFiles, TargetFiles
from gptoss_convert.machine.progress import SILENT, Progress
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.machine.small_files import pieces, write_file
from gptoss_convert.quantise.report import Calibrated


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    conversion: Conversion
    seconds: float
    peak_memory: int
    resumed_steps: int
    """Steps that an interrupted run had finished before."""
    outcomes: Mapping[str, Effect]
    """By weight."""
    calibrated: Calibrated | None = None
    """What a calibration did, where one rounded the experts in this run."""

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
            "calibration": self.calibrated.summary() if self.calibrated else None,
        }


def convert(
    source: str | Path, target: str | Path, options: Options, progress: Progress = SILENT
) -> Report:
    """Convert SOURCE to TARGET; TARGET appears complete or not at all."""
    return run(plan(source, target, options), progress)


@dataclass(frozen=True)
class _Job:
    """A conversion under way, as one rank sees it."""

    conversion: Conversion
    progress: Progress
    source: ByteSource | None
    ranks: Ranks

    @property
    def target_files(self) -> TargetFiles:
        """The files of the work directory, for this rank to write."""
        several = self.ranks.local_size < self.ranks.size
        return TargetFiles(work_path(self.conversion.target), other_machines=several)


def run(
    conversion: Conversion,
    progress: Progress = SILENT,
    source: ByteSource | None = None,
    ranks: Ranks = ALONE,
) -> Report:
    """Execute a planned conversion; `source` stands in for the files that the plan reads.

    Each of several ranks executes its share, and rank 0, whose report is complete, publishes.
    Raises CodecError if a value has no MXFP4 form and `lossy` was not asked for: what would be lost
    is stated, by weight, in its message.
    """
    if source is None and conversion.source.repository is not None:
        if ranks.size > 1:
            raise UsageError(
                f"{conversion.source.place}: several ranks need SOURCE in a directory: download it "
                "first, or convert with one process"
            )
        from gptoss_convert.hub.fetch import fetched

        folder = shards_path(conversion.target) if conversion.options.stream else None
        with fetched(conversion.source, conversion.reads, folder, progress) as (places, stream):
            return _run(_Job(replace(conversion, places=places), progress, stream, ranks))
    return _run(_Job(conversion, progress, source, ranks))


def _run(job: _Job) -> Report:
    began = time.monotonic()
    conversion, ranks = job.conversion, job.ranks
    for note in conversion.notes:
        job.progress.note(note)
    if conversion.layers and ranks.size > 1:
        raise UsageError("--lossy calibrated: one process rounds layer after layer, without ranks")
    done, before, calibrated = (*_follow(job), None) if ranks.rank else _lead(job)
    # No rank ends before TARGET is there.
    ranks.barrier()
    outcomes = outcomes_of(conversion, done.values())
    seconds = time.monotonic() - began
    peak = resources.peak_memory()
    return Report(conversion, seconds, peak, len(before), outcomes, calibrated)


def _lead(job: _Job) -> tuple[Mapping[int, Done], Mapping[int, Done], Calibrated | None]:
    """Run as rank 0, or as the only process.

    Returns all steps, those that were done before, and what a calibration did.
    """
    conversion, ranks = job.conversion, job.ranks
    with workspace(conversion.target, conversion.options.restart, conversion.names) as space:
        journal = Journal(space.journal, str(conversion.target), conversion.header)
        _take_over(journal, conversion.target, space.other_ranks())
        if journal.published is not None and _is_published(space, journal.published):
            ranks.broadcast(None)
            _state_left(job, space.finish(journal.published.replaces))
            return journal.done, journal.done, None
        if not conversion.options.overwrite:
            check_absent(conversion.target)
        replaced = journal.published.replaces if journal.published else None
        journal.working_in(space.open(replaced))
        space.require_replaceable()
        needed = conversion.write_bytes - _held(space.work)
        resources.check_disk(conversion.target.parent.resolve(), needed)
        calibrated = _calibrate(job)
        with job.target_files as files:
            _create(conversion, files)
            ranks.broadcast(conversion.header)
            require_shared(conversion.target, ranks)
            # Until all are here, some may still read this journal for steps of an interrupted run.
            ranks.barrier()
            before = _execute(job, files, journal, journal.done)
        # Now the others have closed their journals, and all that these record is on the disk.
        ranks.barrier()
        _take_over(journal, conversion.target, range(1, ranks.size))
        done = {number: journal.done[number] for number in range(len(conversion.plan.steps))}
        refuse_zeros(conversion, done)
        state_losses(conversion, outcomes_of(conversion, done.values()), job.progress)
        manifest_crc = _close(conversion, space.work, done)
        publishing = Publishing(manifest_crc, space.open(replaced), space.replaces() or replaced)
        journal.publishing(publishing)
        _state_left(job, space.publish(publishing.replaces))
    return done, before, calibrated


def _state_left(job: _Job, left: Path | None) -> None:
    """Say what of a replaced TARGET could not be removed."""
    if left is not None:
        job.progress.note(f"{left}: what is left of the TARGET that was replaced; remove it")


def _calibrate(job: _Job) -> Calibrated | None:
    """Round the experts first, where the plan takes them from a calibration."""
    conversion = job.conversion
    if conversion.layers is None:
        return None
    found = lossy.calibrate(conversion.source, conversion.layers, conversion.options, job.progress)
    for line in found.lines():
        job.progress.note(line)
    return found


def _follow(job: _Job) -> tuple[Mapping[int, Done], Mapping[int, Done]]:
    """Run as another rank; returns the steps that it did, and those that were done before."""
    conversion, ranks = job.conversion, job.ranks
    header = ranks.broadcast()
    if header is None:
        return {}, {}
    require_same_plan(conversion, header, ranks)
    require_shared(conversion.target, ranks)
    known = recorded(journal_path(conversion.target))
    ranks.barrier()
    with locked_journal(conversion.target, ranks.rank) as descriptor, job.target_files as files:
        journal = Journal(descriptor, str(conversion.target), header)
        before = _execute(job, files, journal, known)
    ranks.barrier()
    return journal.done, before


def _take_over(journal: Journal, target: Path, ranks: Iterable[int]) -> None:
    """Record in rank 0's journal what those of other ranks say."""
    for rank in ranks:
        with locked_journal(target, rank) as descriptor:
            journal.take_over(descriptor)


def _create(conversion: Conversion, files: TargetFiles) -> None:
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


def _open(conversion: Conversion, files: TargetFiles, numbers: Iterable[int]) -> None:
    """The files that these steps write, which rank 0 has created."""
    steps = (conversion.plan.steps[number] for number in numbers)
    names = {extent.file.name for step in steps for extent in step.targets}
    for file in conversion.image.files:
        if file.name in names:
            files.create(file.name, file.size)


def _close(conversion: Conversion, work: Path, done: Mapping[int, Done]) -> int:
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


def _is_published(space: Workspace, publishing: Publishing) -> bool:
    """Whether an interrupted run had renamed its work to TARGET already."""
    path = space.target / manifest.NAME
    if not path.is_file() or space.target.stat().st_ino != publishing.inode:
        return False
    return zlib.crc32(path.read_bytes()) == publishing.manifest


def _execute(
    job: _Job, files: TargetFiles, journal: Journal, known: Mapping[int, Done]
) -> dict[int, Done]:
    """Run this rank's share of the steps that are not done yet; returns those done before."""
    conversion, ranks, plan = job.conversion, job.ranks, job.conversion.plan
    before = intact(conversion, known, job.progress, ranks)
    left = [number for number in range(len(plan.steps)) if number not in before]
    shares = shares_of(plan, left, ranks.size)
    mine = shares[ranks.rank]
    if ranks.rank:
        _open(conversion, files, mine)
    total = sum(plan.steps[number].moved_bytes() for number in mine)
    with (
        _reading(conversion, job.source) as sources,
        job.progress.phase("converting", total, len(mine)) as advance,
    ):
        stream = sources if isinstance(sources, ShardStream) else None

        def finished(batch: list[Done]) -> None:
            refuse_nonfinite(conversion, batch)
            # In this order: the journal never speaks of bytes that a crash could take back.
            files.sync()
            journal.append(batch)
            if stream:
                stream.finished(result.step for result in batch)

        def advanced(moved: int) -> None:
            ranks.check()
            advance(moved)

        execute(
            plan,
            stream.begin(plan, mine) if stream else spread(plan, mine),
            sources,
            files,
            workers=conversion.workers,
            finished=finished,
            advance=advanced,
            interrupt=stream.interrupt if stream else lambda: None,
            every=0.25 if stream else 2.0,
        )
        files.sync()
        if isinstance(sources, SourceFiles):
            sources.require_unchanged()
    require_kept(conversion, shares, journal.done, ranks)
    return before


def _reading(
    conversion: Conversion, source: ByteSource | None
) -> AbstractContextManager[ByteSource]:
    """What the workers read from, for as long as they do."""
    if source is None:
        return SourceFiles(conversion.places)
    return source if isinstance(source, ShardStream) else nullcontext(source)


def _held(work: Path) -> int:
    """Bytes of disk that an interrupted run's files already hold."""
    return sum(path.stat().st_blocks * 512 for path in work.rglob("*") if path.is_file())

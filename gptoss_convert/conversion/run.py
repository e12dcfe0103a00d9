"""Running a planned conversion: execute, record and publish, or resume an interrupted run."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.containers.paths import require_unchanged
from gptoss_convert.conversion import lossy, work_files
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
from gptoss_convert.conversion.publish import finish, is_published, publish, require_replaceable
from gptoss_convert.conversion.resume import intact
from gptoss_convert.conversion.target import (
    check_absent,
    journal_path,
    locked_journal,
    shards_path,
    work_path,
)
from gptoss_convert.conversion.workspace import workspace
from gptoss_convert.engine.execute import execute
from gptoss_convert.engine.records import Done, Effect
from gptoss_convert.errors import UsageError
from gptoss_convert.machine import resources
from gptoss_convert.machine.files import ByteSource, SourceFiles
from gptoss_convert.machine.progress import SILENT, Progress
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.machine.target_files import TargetFiles

if TYPE_CHECKING:
    from gptoss_convert.hub.stream import ShardStream
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
    stream: ShardStream | None = None
    """The shards that come while steps are done; it is read instead of `source`."""

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
        from gptoss_convert.hub.fetch import fetched

        if conversion.options.stream and ranks.size > 1:
            raise UsageError("--stream: for one process; of several ranks each has its cache")
        folder = shards_path(conversion.target) if conversion.options.stream else None
        with fetched(conversion.source, conversion.reads, folder, progress) as (places, stream):
            return _run(_Job(replace(conversion, places=places), progress, None, ranks, stream))
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
        if journal.published is not None and is_published(space, journal.published):
            ranks.broadcast(None)
            _state_left(job, finish(space, journal.published.replaces))
            return journal.done, journal.done, None
        if not conversion.options.overwrite:
            check_absent(conversion.target)
        replaced = journal.published.replaces if journal.published else None
        journal.working_in(space.open(replaced))
        require_replaceable(space)
        needed = conversion.write_bytes - work_files.held_bytes(space.work)
        resources.check_disk(conversion.target.parent.resolve(), needed)
        calibrated = _calibrate(job)
        with job.target_files as files:
            work_files.create(conversion, files)
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
        manifest_crc = work_files.complete(conversion, space.work, done)
        publishing = Publishing(manifest_crc, space.open(replaced), space.replaces() or replaced)
        journal.publishing(publishing)
        _state_left(job, publish(space, publishing.replaces))
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


def _execute(
    job: _Job, files: TargetFiles, journal: Journal, known: Mapping[int, Done]
) -> dict[int, Done]:
    """Run this rank's share of the steps that are not done yet; returns those done before."""
    conversion, ranks, plan = job.conversion, job.ranks, job.conversion.plan
    stream = job.stream
    before = intact(conversion, known, job.progress, ranks)
    left = [number for number in range(len(plan.steps)) if number not in before]
    shares = shares_of(plan, left, ranks.size)
    mine = shares[ranks.rank]
    if ranks.rank:
        work_files.open_for(conversion, files, mine)
    total = sum(plan.steps[number].moved_bytes() for number in mine)
    with (
        _reading(job) as sources,
        job.progress.phase("converting", total, len(mine)) as advance,
    ):
        at_once = conversion.changes.files_at_once

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
            stream.begin(plan, mine) if stream else spread(plan, mine, at_once),
            sources,
            files,
            workers=conversion.workers,
            finished=finished,
            advance=advanced,
            interrupt=stream.interrupt if stream else lambda: None,
            every=0.25 if stream else 2.0,
        )
        files.sync()
        require_unchanged(conversion.seen)
    require_kept(conversion, shares, journal.done, ranks)
    return before


def _reading(job: _Job) -> AbstractContextManager[ByteSource]:
    """What the workers read from, for as long as they do."""
    if job.source is not None:
        return nullcontext(job.source)
    return job.stream or SourceFiles(job.conversion.places)

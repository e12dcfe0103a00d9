"""Reading a checkpoint once more: CRC-32 of its bytes, fingerprints and anomalies of its values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from isal import isal_zlib

from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.engine.anomalies import examine
from gptoss_convert.engine.buffers import Part, StepReader
from gptoss_convert.engine.records import Anomalies, Digest, Region
from gptoss_convert.engine.steps import Plan, make_plan
from gptoss_convert.engine.work import Work
from gptoss_convert.errors import IntegrityError
from gptoss_convert.formats.checkpoint import Checkpoint, casts
from gptoss_convert.layouts.model import load_model
from gptoss_convert.machine import resources
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.threads import run_all


@dataclass(frozen=True, slots=True)
class Seen:
    """What one step of the plan found."""

    step: int
    regions: tuple[Region, ...]
    """Their files by the names that the manifest has for them."""
    fingerprint: int
    anomalies: Anomalies
    problem: str | None
    """Why the values do not decode."""


def reading_plan(checkpoint: Checkpoint) -> Plan:
    """The steps that read every parameter of a checkpoint once, sidecar scales included."""
    model = load_model()
    held = checkpoint.extents(casts(True))
    return make_plan(model, model.sizes(checkpoint.config.numbers), held, held)


def reread(
    checkpoint: Checkpoint,
    plan: Plan,
    numbers: Sequence[int],
    *,
    workers: int | None,
    max_memory: int | None,
    progress: Progress,
) -> list[Seen]:
    """Read the steps of these numbers; raises IntegrityError for files that change meanwhile."""
    # The plan's targets are its sources again: a worker holds them once.
    room = max((plan.steps[number].source_bytes() for number in numbers), default=0)
    count = resources.choose_workers(room, max_memory, workers, shared_bytes=plan.own_bytes)
    seen: list[Seen] = []
    total = plan.read_bytes * len(numbers) // max(len(plan.steps), 1)
    with (
        SourceFiles() as files,
        progress.phase("reading", total, len(numbers)) as advance,
    ):
        run_all(
            numbers,
            lambda: _Worker(plan, files, checkpoint.base, room).run,
            workers=count,
            finished=seen.extend,
            advance=advance,
        )
        files.require_unchanged()
    return sorted(seen, key=lambda result: result.step)


class _Worker:
    def __init__(self, plan: Plan, files: SourceFiles, base: Path, room: int) -> None:
        self._plan = plan
        self._base = base
        self._reader = StepReader(files, room)

    def run(self, number: int) -> tuple[Seen, int]:
        step = self._plan.steps[number]
        regions: list[Region] = []
        self._reader.begin()
        held, nbytes = self._reader.read(
            step, step.sources, lambda part: regions.extend(self._regions(part))
        )
        work = Work(step, held, {})
        work.run(step.recipe.first)
        digest, problem = Digest(None, True), None
        try:
            digest = work.digest(EncodeStats())
        except IntegrityError as error:
            problem = str(error)
        anomalies = examine(work, digest.finite)
        found = Seen(number, tuple(regions), digest.fingerprint or 0, anomalies, problem)
        return found, nbytes

    def _regions(self, part: Part) -> Iterator[Region]:
        memory = memoryview(self._reader.arena.memory)
        for offset, position, length in part.byte_ranges():
            crc = isal_zlib.crc32(memory[position : position + length])
            place = part.extent.file.path.relative_to(self._base).as_posix()
            yield Region(place, offset, length, crc)

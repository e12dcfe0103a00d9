"""Conversions: open SOURCE, plan, write TARGET, publish it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert import resources, sidecar
from gptoss_convert.checkpoint import Checkpoint, Choices, casts, open_checkpoint
from gptoss_convert.containers import Image
from gptoss_convert.errors import CodecError, UsageError
from gptoss_convert.extents import Extent, extents
from gptoss_convert.model import load_model
from gptoss_convert.plan import Plan, make_plan
from gptoss_convert.progress import SILENT, Progress
from gptoss_convert.publish import check_target, workspace
from gptoss_convert.tables import load_table
from gptoss_convert.targets import make_image

if TYPE_CHECKING:
    from gptoss_convert.files import ByteSource

ENCODINGS = ("keep", "mxfp4", "bf16")
SHARDS = ("auto", "size", "published")
_REFERENCE = "scales:"
"""Prefix of the files of another checkpoint that only lends its scales."""


@dataclass(frozen=True)
class Options:
    """How to convert; the defaults are the command line's."""

    to: str
    dtype: str = "keep"
    source_format: str | None = None
    shards: str = "auto"
    """`auto`: as the MXFP4 source was, where a sidecar remembers it, else by size."""
    max_shard_size: int = 5_000_000_000
    max_memory: int = 4_000_000_000
    workers: int | None = None
    scales: Path | None = None
    """An MXFP4 checkpoint, or a BF16 one with a sidecar, whose block scales are preferred."""
    keep_scales: bool = True
    """Write the sidecar where MXFP4 is decoded."""
    cast: bool = False
    lossy: bool = False
    repair: bool = False
    layout: str = "stacked"
    """Megatron: layers `stacked` in one tensor, or one tensor `per-layer`."""
    also_local_spec: bool = False
    """Megatron: write the second norm under the local spec's name too."""
    bridge: str = "modern"
    """Megatron-Bridge: run_config.yaml for 0.4.0 and later, or `legacy`."""
    iteration: int | None = None
    config: Path | None = None
    vocab_size: int | None = None
    tokenizer: Path | None = None
    overwrite: bool = False

    @property
    def choices(self) -> Choices:
        """What concerns the opening of SOURCE."""
        return Choices(
            self.source_format, self.repair, self.iteration, self.config, self.vocab_size
        )


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to run: every check made, every byte's place decided."""

    source: Checkpoint
    target: Path
    variant: str
    options: Options
    plan: Plan
    image: Image
    roots: Mapping[str, Path]
    """The directories that files of the plan lie in, by prefix of the file name."""
    workers: int
    notes: tuple[str, ...]

    @cached_property
    def write_bytes(self) -> int:
        """Bytes of all files of TARGET but the carried ones."""
        return sum(file.size for file in self.image.files) + sum(
            len(content) for _, content in self.image.closing
        )

    def summary(self) -> dict[str, Any]:
        """The conversion as plain data."""
        table = load_table(self.options.to)
        return {
            "source": {"path": str(self.source.root), "format": self.source.label},
            "target": {
                "path": str(self.target),
                "format": self.options.to,
                "variant": self.variant,
                "tensors": len({chunk.tensor for chunk in self.image.chunks}),
                "files": {file.name: file.size for file in self.image.files},
            },
            "model": self.source.config.size,
            "container": table.container,
            "steps": len(self.plan.steps),
            "read_bytes": self.plan.read_bytes,
            "write_bytes": self.write_bytes,
            "workers": self.workers,
            "memory_bytes": resources.BASE_BYTES + self.workers * self.plan.buffer_bytes,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    conversion: Conversion
    seconds: float
    peak_memory: int
    outcomes: Mapping[str, Any]
    """By weight: encoding statistics and values rounded by a cast."""

    def summary(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            **self.conversion.summary(),
            "seconds": round(self.seconds, 3),
            "peak_memory_bytes": self.peak_memory,
            "outcomes": {
                weight: {"cast_values": o.cast_values, **asdict(o.encoded)}
                for weight, o in self.outcomes.items()
                if o.encoded.blocks or o.cast_values
            },
        }


def plan(source: str | Path, target: str | Path, options: Options) -> Conversion:
    """Everything that is decided before the first byte: opens and checks, reads headers only."""
    source, target = Path(source), Path(target)
    check_target(source, target, options.overwrite)
    opened = open_checkpoint(source, options.choices)
    return plan_opened(opened, target, options)


def plan_opened(opened: Checkpoint, target: Path, options: Options) -> Conversion:
    """The plan for a checkpoint that is open; TARGET has been checked."""
    variant = _variant(opened, options)
    notes = [*opened.notes]
    sizes = load_model().sizes(opened.config.numbers)
    held = opened.extents(casts(options.cast))
    roots = opened.roots
    if options.scales is not None:
        held, lent = _with_reference(opened, held, options.scales)
        roots |= lent
    image, more_notes = make_image(opened, variant, options)
    taken = _target_extents(options.to, variant, sizes, image)
    steps = make_plan(load_model(), sizes, held, taken)
    workers = resources.choose_workers(steps.buffer_bytes, options.max_memory, options.workers)
    return Conversion(
        opened, target, variant, options, steps, image, roots, workers, (*notes, *more_notes)
    )


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
    is stated, by weight, through `progress` first.
    """
    from gptoss_convert.execute import execute
    from gptoss_convert.files import SourceFiles, TargetFiles, write_file

    began = time.monotonic()
    for note in conversion.notes:
        progress.note(note)
    target = conversion.target
    resources.check_disk(target.parent.resolve(), conversion.write_bytes)
    with workspace(target, conversion.options.overwrite) as work:
        total = conversion.plan.read_bytes + conversion.plan.write_bytes
        with (
            nullcontext(source) if source else SourceFiles(conversion.roots) as sources,
            TargetFiles(work) as files,
            progress.phase("converting", total, len(conversion.plan.steps)) as advance,
        ):
            for file in conversion.image.files:
                files.create(file.name, file.size)
                for offset, content in file.fixed:
                    files.write_bytes(file.name, offset, content)
            outcomes = execute(
                conversion.plan, sources, files, workers=conversion.workers, advance=advance
            )
            files.sync()
        _state_losses(conversion, outcomes, progress)
        for name, content in conversion.image.closing:
            write_file(work / name, content)
    seconds = time.monotonic() - began
    return Report(conversion, seconds, resources.peak_memory(), outcomes)


def _variant(source: Checkpoint, options: Options) -> str:
    """The target's variant for `--to` and `--dtype`."""
    encoding = source.encoding if options.dtype == "keep" else options.dtype
    if options.to == "hf":
        return encoding
    if options.to == "openai":
        if options.dtype == "bf16":
            raise UsageError("--to openai --dtype bf16: OpenAI's layout has MXFP4 experts only")
        return "mxfp4"
    if options.dtype == "mxfp4":
        raise UsageError("--to megatron --dtype mxfp4: Megatron's layout has BF16 experts only")
    return options.layout + ("-both" if options.also_local_spec else "")


def _with_reference(
    source: Checkpoint, held: list[Extent], path: Path
) -> tuple[list[Extent], dict[str, Path]]:
    """The source's extents with the scales of another checkpoint instead of its own."""
    if source.encoding == "mxfp4":
        raise UsageError(f"--scales {path}: SOURCE is MXFP4 and has its own scales")
    reference = open_checkpoint(path)
    if reference.config.numbers != source.config.numbers:
        raise UsageError(f"--scales {path}: another size of model than {source.root}")
    wanted = {family.scales for family in load_model().families.values()}
    lent = [e for e in reference.extents() if e.param in wanted]
    if not lent:
        raise UsageError(f"--scales {path}: holds no MXFP4 scales")
    own = [extent for extent in held if extent.param not in wanted]
    roots = {_REFERENCE + prefix: root for prefix, root in reference.roots.items()}
    return own + [replace(e, file=_REFERENCE + e.file) for e in lent], roots


def _target_extents(
    format: str, variant: str, sizes: Mapping[str, int], image: Image
) -> list[Extent]:
    beside = [c for c in image.chunks if c.file.startswith(f"{sidecar.FOLDER}/")]
    weights = [c for c in image.chunks if not c.file.startswith(f"{sidecar.FOLDER}/")]
    taken = extents("target", load_table(format).tensors(variant, sizes), weights)
    if beside:
        taken += extents("target", load_table("scales").tensors("scales", sizes), beside)
    return taken


def _state_losses(conversion: Conversion, outcomes: Mapping[str, Any], progress: Progress) -> None:
    """Say, by weight, what rounding lost; refuse unless that was asked for."""
    lossy = False
    for weight, outcome in outcomes.items():
        if outcome.cast_values:
            progress.note(f"{weight}: {outcome.cast_values} values rounded to BF16")
        stats = outcome.encoded
        if stats.inexact_blocks:
            lossy = True
            share = stats.inexact_blocks / stats.blocks
            noise = 10 * _log10(stats.squares / stats.squared_error) if stats.squared_error else 0
            progress.note(
                f"{weight}: {stats.inexact_blocks} of {stats.blocks} blocks ({share:.1%}) are not "
                f"exact in MXFP4: {stats.inexact_values} values rounded, {stats.clipped} clipped, "
                f"{stats.flushed} flushed to zero, SQNR {noise:.1f} dB"
            )
    if lossy and not conversion.options.lossy:
        raise CodecError(
            f"{conversion.source.root}: not exactly representable in MXFP4 (see above); "
            "pass --lossy to round, nothing was written"
        )


def _log10(value: float) -> float:
    from math import log10

    return log10(value)

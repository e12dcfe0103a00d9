"""Planning a conversion: SOURCE is opened, and all is decided before the first byte is written."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.containers import Image, content_size
from gptoss_convert.containers.refs import Copied, FileRef
from gptoss_convert.containers.seen import remembering
from gptoss_convert.conversion import lossy
from gptoss_convert.conversion.acceptable import require_acceptable
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.target import check_input, check_reads, check_target
from gptoss_convert.engine.changes import Changes, merges_of
from gptoss_convert.engine.steps import Plan, make_plan
from gptoss_convert.errors import UsageError
from gptoss_convert.formats import sidecar
from gptoss_convert.formats.checkpoint import MANIFEST, Checkpoint, Choices, casts, encoding
from gptoss_convert.formats.registry import FORMATS, open_checkpoint
from gptoss_convert.hub.adapters import with_adapter
from gptoss_convert.hub.sources import locate, opening
from gptoss_convert.layouts.extents import Extent, extents
from gptoss_convert.layouts.folding import fold_tensors
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table
from gptoss_convert.layouts.tables import Table
from gptoss_convert.machine import resources
from gptoss_convert.machine.files import Places
from gptoss_convert.machine.small_files import pieces
from gptoss_convert.version import VERSION

if TYPE_CHECKING:
    from gptoss_convert.quantise.layers import RoundedLayers


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to run: every check made, every byte's place decided."""

    source: Checkpoint
    target: Path
    variant: str
    options: Options
    plan: Plan
    image: Image
    workers: int
    notes: tuple[str, ...]
    changes: Changes = field(default_factory=Changes)
    """What an adapter changes on the way, and how values are rounded."""
    layers: RoundedLayers | None = None
    """What a calibration will have rounded before the plan is executed."""
    places: Places = field(default_factory=dict)
    """Where the directories of a repository lie once its files are at hand."""
    seen: tuple[FileRef, ...] = ()
    """The files on disk that it was planned from, as they were."""

    @cached_property
    def reads(self) -> Set[FileRef]:
        """Every file that the conversion reads."""
        return self._weight_files | {c.file for _, c in self.image.closing if isinstance(c, Copied)}

    @cached_property
    def _weight_files(self) -> Set[FileRef]:
        held = (extent for step in self.plan.steps for extent in step.sources)
        return {file for extent in held for file in extent.files}

    @cached_property
    def names(self) -> frozenset[str]:
        """Every file of TARGET."""
        closing = (name for name, _ in self.image.closing)
        return frozenset((*(file.name for file in self.image.files), *closing, MANIFEST))

    @cached_property
    def write_bytes(self) -> int:
        """Bytes of all files of TARGET but the carried ones."""
        return sum(file.size for file in self.image.files) + sum(
            content_size(content) for _, content in self.image.closing
        )

    @property
    def _memory_bytes(self) -> int:
        """Bytes that the plan, the workers and the adapter take at most."""
        each = self.plan.buffer_bytes + self.changes.worker_bytes
        return self.workers * each + self.changes.shared_bytes + self.plan.own_bytes

    @cached_property
    def header(self) -> dict[str, Any]:
        """What decides the bytes of TARGET: an interrupted run is resumed only with the same."""
        digest = hashlib.sha256()
        for file in self.image.files:
            digest.update(f"{file.name} {file.size}\n".encode())
            for _, content in file.fixed:
                digest.update(content)
        for name, content in self.image.closing:
            digest.update(f"{name} {content_size(content)}\n".encode())
            for piece in pieces(content, self.places):
                digest.update(piece)
        digest.update(f"{len(self.plan.steps)} steps".encode())
        files = self._weight_files
        return {
            "tool": f"gptoss-convert {VERSION}",
            "options": self.options.decisive,
            "source": {name: self._identity(file) for name, file in sorted(self._named(files))},
            "headers": self._headers(),
            "plan": digest.hexdigest(),
            "from": self._from(),
            "to": {"format": self.options.to, "variant": self.variant},
        } | ({"adapter": self._adapter} if self._adapter else {})

    def _from(self) -> dict[str, str]:
        source = self.source
        found = {"path": source.place, "format": source.label}
        return found | ({"revision": source.commit} if source.commit else {})

    @cached_property
    def _adapter(self) -> dict[str, Any] | None:
        """What is merged: dialect, strength and digest."""
        adapter = self.source.adapter
        return adapter.record() if adapter else None

    def _named(self, files: Iterable[FileRef]) -> Iterator[tuple[str, FileRef]]:
        """Files by names that stay the same wherever SOURCE lies."""
        base = self.source.base
        for file in files:
            inside = file.path.is_relative_to(base)
            yield (str(file.path.relative_to(base)) if inside else str(file)), file

    def _identity(self, file: FileRef) -> list[int]:
        """Which file it was when its header was read; empty for one that was not on disk then."""
        outline = self.source.outline
        if outline is not None and file.root.is_relative_to(outline):
            # The commit identifies it; the time of a download does not.
            return []
        # Rounded layers have none: the run makes and removes them, and they record their origin.
        one = file.identity
        # Devices are numbered anew when a machine starts.
        return [one.size, one.written_ns, one.changed_ns, one.inode] if one else []

    def _headers(self) -> str:
        """SHA-256 of what the headers say: which tensor lies where."""
        digest = hashlib.sha256()
        beside = self.source.scales.chunks if self.source.scales else ()
        for chunk in (*self.source.chunks, *beside):
            digest.update(f"{chunk}\n".encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, Any]:
        """The conversion as plain data."""
        table = FORMATS[self.options.to].table
        sizes = load_model().sizes(self.source.config.numbers)
        order = (tensor.name for tensor in table.tensors(self.variant, sizes))
        return {
            "source": {**self._from(), "revision": self.source.commit},
            "target": {
                "path": str(self.target),
                "format": self.options.to,
                "variant": self.variant,
                "tensors": len({chunk.tensor for chunk in self.image.chunks}),
                "tensor_groups": [one.summary() for one in fold_tensors(self.image.chunks, order)],
                "files": {file.name: file.size for file in self.image.files},
            },
            "adapter": self._adapter,
            "model": self.source.config.size,
            "container": table.container,
            "steps": len(self.plan.steps),
            "read_bytes": self.plan.read_bytes,
            "write_bytes": self.write_bytes,
            "workers": self.workers,
            "memory_bytes": resources.BASE_BYTES + self._memory_bytes,
            "notes": list(self.notes),
        }


def plan(
    source: str | Path, target: str | Path, options: Options, processes: int = 1
) -> Conversion:
    """Everything that is decided before the first byte: opens and checks, reads headers only.

    `processes` is how many processes of one run share this machine.
    """
    place, target = locate(source, options.revision), Path(target)
    if options.stream and isinstance(place, Path):
        raise UsageError(f"--stream: {place} is not a repository on the Hub")
    target = check_target(place, target)
    others = {
        "--adapter": options.adapter,
        "--scales": options.scales,
        "--base": options.base,
        "--tokenizer": options.tokenizer,
        "--config": options.config,
        "--calibrate": options.calibrate,
    }
    for name, path in others.items():
        if path is not None and Path(path).exists():
            check_input(name, Path(path), target)
    with remembering() as seen, opening(place, options) as opened:
        opened = with_adapter(opened, options, follow_links=options.follow_links)
        options = _for_adapter(opened, options)
        planned = plan_opened(opened, target, options, processes)
    read = tuple(opened.lasting(seen.values()))
    check_reads(read, target)
    return replace(planned, seen=read)


def _for_adapter(opened: Checkpoint, options: Options) -> Options:
    """The options, adapted to a merge; raises UsageError if it needs a rounding not asked for."""
    if opened.adapter is None or not opened.adapter.changes_experts:
        return options
    kind = FORMATS[options.to]
    variant = kind.variant(opened.encoding if options.dtype == "keep" else options.dtype, options)
    stored = encoding(kind.table, variant)
    if stored != "bf16" and not options.lossy:
        raise UsageError(
            f"--adapter {opened.adapter.place}: changes the experts, which {stored.upper()} "
            "rounds; pass --dtype bf16 where --to allows it, or --lossy to round them"
        )
    # The scales belong to the experts before the merge: kept, they would restore nothing.
    return replace(options, keep_scales=False)


def plan_opened(
    opened: Checkpoint, target: Path, options: Options, processes: int = 1
) -> Conversion:
    """The plan for a checkpoint that is open; TARGET has been checked."""
    kind = FORMATS[options.to]
    variant = kind.variant(opened.encoding if options.dtype == "keep" else options.dtype, options)
    notes = [*opened.notes]
    sizes = load_model().sizes(opened.config.numbers)
    held = opened.extents(casts(options.cast))
    if options.scales is not None:
        held = _with_reference(opened, held, options.scales, options.follow_links)
    rule = lossy.rule_of(options)
    layers = None
    if rule == lossy.CALIBRATED:
        encodes = encoding(kind.table, variant) == "mxfp4"
        layers = lossy.rounded_layers(opened, target, encodes, sizes)
        held = lossy.with_rounded(held, layers)
    image, more_notes = kind.image(opened, variant, options)
    require_acceptable(image)
    taken = _target_extents(kind.table, variant, sizes, image)
    changes = lossy.with_rounding(merges_of(*opened.updates), held, rule)
    steps = make_plan(load_model(), sizes, held, taken, changes=changes.by_weight)
    workers = resources.choose_workers(
        steps.buffer_bytes + changes.worker_bytes,
        options.max_memory,
        options.workers,
        processes,
        changes.shared_bytes + steps.own_bytes,
    )
    notes += more_notes
    return Conversion(
        opened, target, variant, options, steps, image, workers, tuple(notes), changes, layers
    )


def _with_reference(
    source: Checkpoint, held: list[Extent], path: Path, follow_links: bool
) -> list[Extent]:
    """The source's extents with the scales of another checkpoint instead of its own."""
    if source.encoding == "mxfp4":
        raise UsageError(f"--scales {path}: SOURCE is MXFP4 and has its own scales")
    reference = open_checkpoint(path, Choices(follow_links=follow_links))
    if reference.config.numbers != source.config.numbers:
        raise UsageError(f"--scales {path}: another size of model than {source.root}")
    wanted = {param for family in load_model().families.values() for param in family.hints}
    lent = [e for e in reference.extents() if e.param in wanted]
    if not lent:
        raise UsageError(f"--scales {path}: holds no MXFP4 scales")
    own = [extent for extent in held if extent.param not in wanted]
    return own + lent


def _target_extents(
    table: Table, variant: str, sizes: Mapping[str, int], image: Image
) -> list[Extent]:
    beside = [c for c in image.chunks if sidecar.holds(c.file)]
    weights = [c for c in image.chunks if not sidecar.holds(c.file)]
    taken = extents("target", table.tensors(variant, sizes), weights)
    if beside:
        taken += extents("target", load_table("scales").tensors("scales", sizes), beside)
    return taken

"""Checking a checkpoint: its structure, and on request its bytes, against the manifest."""

from __future__ import annotations

import math
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.check.options import HEADERS, Reading
from gptoss_convert.check.scrub import Seen, reading_plan, reread
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.conversion.manifest import NAME, Manifest, joined_crc, read_manifest
from gptoss_convert.engine.anomalies import is_vector, tensors_of, zero_matrices
from gptoss_convert.engine.fingerprint import by_layer, listing
from gptoss_convert.engine.records import Region
from gptoss_convert.engine.steps import Plan
from gptoss_convert.errors import UsageError
from gptoss_convert.formats import carried, releases, sidecar
from gptoss_convert.formats.checkpoint import DEFAULT, Checkpoint, Choices, casts
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.hub.names import repository
from gptoss_convert.layouts.folding import fold
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.progress import SILENT, Progress

_SMALL = 256 << 20
"""Files without weights up to this size are read in every check."""


@dataclass(frozen=True)
class CheckReport:
    """What a check found; the directory is intact if there are no problems."""

    checkpoint: Checkpoint
    manifest: Manifest | None
    share: float
    seed: int | None
    seconds: float
    release: str | None
    """The published release that the weight files are, judged by sizes, or by SHA-256 too."""
    parameters: Mapping[str, Mapping[str, Any]]
    """Fingerprints of the parameters that were read whole."""
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "path": str(self.checkpoint.root),
            "format": self.checkpoint.label,
            "model": self.checkpoint.config.size,
            "manifest": self.manifest.tool if self.manifest else None,
            "share_read": self.share,
            "seed": self.seed,
            "seconds": round(self.seconds, 3),
            "release": self.release,
            "parameters": dict(self.parameters),
            "problems": list(self.problems),
            "notes": list(self.notes),
        }

    @property
    def verdict(self) -> str:
        """`intact`, or the first problem and how many others there are."""
        others = len(self.problems) - 1
        more = f" (and {others} more)" if others > 0 else ""
        return self.problems[0] + more if self.problems else "intact"


def check(
    path: str | Path,
    reading: Reading = HEADERS,
    choices: Choices = DEFAULT,
    progress: Progress = SILENT,
) -> CheckReport:
    """Check a directory; what `inspect` refuses is raised, all else that is wrong is reported."""
    began = time.monotonic()
    if repository(str(path)):
        raise UsageError(
            f"{path}: a repository on the Hub, or no such directory; check reads directories only"
        )
    opened = open_checkpoint(Path(path), choices)
    opened.extents(casts(True))
    base = opened.base
    manifest = read_manifest(base)
    problems = [*carried.problems(opened.carried)]
    notes = [*opened.notes]
    parameters: Mapping[str, Mapping[str, Any]] = {}
    if manifest is None:
        notes.append(f"no {NAME}: nothing to compare with")
    else:
        problems += _listed_files(base, manifest, _weight_files(opened, base))
        notes += _spare_files(base, manifest)
    seed = reading.seed
    if reading.share:
        seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        plan = reading_plan(opened)
        numbers = _chosen(plan, reading.share, seed)
        seen = reread(
            opened,
            plan,
            numbers,
            workers=reading.workers,
            max_memory=reading.max_memory,
            progress=progress,
        )
        layers = by_layer(plan, ((result.step, result.fingerprint) for result in seen))
        parameters = _whole(plan, layers)
        problems += _judge(opened, base, manifest, plan, seen, layers, reading.share >= 1)
    release, more = _release(opened, reading.share >= 1)
    notes += more
    return CheckReport(
        opened,
        manifest,
        reading.share,
        seed if 0 < reading.share < 1 else None,
        time.monotonic() - began,
        release,
        parameters,
        tuple(problems),
        tuple(notes),
    )


def _place(base: Path, file: FileRef) -> str:
    """The name that the manifest has for a file of an extent."""
    return file.path.relative_to(base).as_posix()


def _weight_files(opened: Checkpoint, base: Path) -> set[str]:
    return {_place(base, file) for file in opened.files()}


def _listed_files(base: Path, manifest: Manifest, weights: set[str]) -> Iterator[str]:
    """What is wrong with the files that the manifest lists; those without weights are read."""
    arena = Arena(0)
    with SourceFiles() as files:
        for name, (size, crc) in sorted(manifest.files.items()):
            path = base / name
            found = path.stat().st_size if path.is_file() else None
            if found is None:
                yield f"{path}: missing; the manifest lists it with {size} bytes"
            elif found != size:
                yield f"{path}: {found} bytes, the manifest says {size}"
            elif name not in weights and size <= _SMALL:
                yield from _same_crc(path, crc, files.crc(FileRef(base, name), 0, size, arena))
    if unlisted := sorted(weights - manifest.files.keys()):
        yield f"{base / NAME}: does not list {', '.join(unlisted)}, which hold weights"


def _same_crc(path: Path, expected: int, found: int) -> Iterator[str]:
    if expected != found:
        yield f"{path}: changed: CRC-32 {found:08x}, the manifest says {expected:08x}"


def _spare_files(base: Path, manifest: Manifest) -> list[str]:
    """A note on files that the manifest does not list, hidden ones aside."""
    listed = {NAME, *manifest.files}
    spare: list[str] = []
    for folder, folders, names in os.walk(base):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        places = (Path(folder, name).relative_to(base).as_posix() for name in sorted(names))
        spare += [place for place in places if place not in listed and not place.startswith(".")]
    more = f" and {len(spare) - 5} more" if len(spare) > 5 else ""
    return [f"not in the manifest: {', '.join(spare[:5])}{more}"] if spare else []


def _chosen(plan: Plan, share: float, seed: int) -> Sequence[int]:
    """The steps of a random share of all layers of all parameters."""
    groups = sorted({(step.family.weight, step.layer) for step in plan.steps})
    count = min(len(groups), max(1, math.ceil(share * len(groups))))
    chosen = set(random.Random(seed).sample(groups, count))
    return [i for i, step in enumerate(plan.steps) if (step.family.weight, step.layer) in chosen]


def _whole(plan: Plan, layers: Mapping[str, Mapping[int, int]]) -> dict[str, Mapping[str, Any]]:
    """Fingerprints of the parameters of which every layer was read."""
    expected: dict[str, set[int]] = defaultdict(set)
    for step in plan.steps:
        expected[step.family.weight].add(step.layer)
    return {
        weight: listing(found)
        for weight, found in layers.items()
        if found.keys() == expected[weight]
    }


def _judge(
    opened: Checkpoint,
    base: Path,
    manifest: Manifest | None,
    plan: Plan,
    seen: Sequence[Seen],
    layers: Mapping[str, Mapping[int, int]],
    everything: bool,
) -> Iterator[str]:
    """What is wrong with the bytes that were read."""
    yield from (result.problem for result in seen if result.problem)
    if manifest is None:
        yield from _odd_values(opened, plan, seen)
        return
    regions = [region for result in seen for region in result.regions]
    damaged = _damaged_files(base, manifest, regions) if everything else {}
    named: set[str] = set()
    for weight, found in layers.items():
        listed = manifest.layers.get(weight, ())
        for layer, value in sorted(found.items()):
            if layer < len(listed) and listed[layer] == value:
                continue
            tensors, files = _tensors(base, plan, (weight, layer), set(damaged))
            named |= files
            known = f"{listed[layer]:016x}" if layer < len(listed) else "nothing"
            yield (
                f"{', '.join(str(base / file) for file in sorted(files))}: {fold(tensors)}: "
                f"{weight} of layer {layer} changed: fingerprint {value:016x}, the manifest says "
                f"{known}"
            )
    for name, text in damaged.items():
        if name not in named:
            yield f"{text}; no weight changed: header, padding or the scales' sidecar"


def _odd_values(opened: Checkpoint, plan: Plan, seen: Iterable[Seen]) -> Iterator[str]:
    found = {result.step: result.anomalies for result in seen}
    yield from (f"{opened.root}: {odd.first}" for odd in found.values() if odd.nonfinite)
    zeros = [m for m in zero_matrices(plan, found) if not is_vector(m[0])]
    if zeros:
        names = fold(tensors_of(plan, zeros))
        yield f"{opened.root}: {len(zeros)} weight matrices are zero throughout, in {names}"


def _damaged_files(base: Path, manifest: Manifest, regions: Iterable[Region]) -> dict[str, str]:
    """The weight files whose CRC-32 is not the manifest's; what no tensor holds is read here."""
    parts: dict[str, list[tuple[int, int, int]]] = defaultdict(list)
    for region in regions:
        parts[region.file].append((region.offset, region.length, region.crc))
    found: dict[str, str] = {}
    arena = Arena(0)
    with SourceFiles() as files:
        for name, held in parts.items():
            size, expected = manifest.files.get(name, (-1, 0))
            path = base / name
            if path.stat().st_size != size:
                continue

            def gap(at: int, length: int, name: str = name) -> int:
                return files.crc(FileRef(base, name), at, length, arena)

            for problem in _same_crc(path, expected, joined_crc(name, size, held, gap)):
                found[name] = problem
    return found


def _tensors(
    base: Path, plan: Plan, group: tuple[str, int], damaged: set[str]
) -> tuple[list[str], set[str]]:
    """The tensors of a layer of a weight and their files; in damaged files, where some are."""
    extents = {
        (_place(base, file), extent.tensor)
        for step in plan.steps
        if (step.family.weight, step.layer) == group
        for extent in step.sources
        for file in extent.files
        if not sidecar.holds(file.name)
    }
    extents = {pair for pair in extents if pair[0] in damaged} or extents
    return sorted({tensor for _, tensor in extents}), {file for file, _ in extents}


def _release(opened: Checkpoint, hashed: bool) -> tuple[str | None, list[str]]:
    """The release that the weight files are, or a note that they only have its sizes."""
    names = {chunk.file for chunk in opened.chunks}
    release = releases.of_sizes({name: (opened.root / name).stat().st_size for name in names})
    if release is None:
        return None, []
    if not hashed:
        return f"{release.name} by file sizes; --read-data compares SHA-256", []
    if other := releases.differing(release, opened.root):
        return None, [f"the sizes of {release.name}, other bytes: {', '.join(other)}"]
    return f"{release.name} as released: every SHA-256 is the published one", []

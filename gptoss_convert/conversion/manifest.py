"""The manifest `gptoss-convert.json`: what TARGET holds, by file and by parameter."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from isal import isal_zlib

from gptoss_convert.codecs.stats import ScaleStatistics
from gptoss_convert.containers import FileImage, Image, content_size
from gptoss_convert.containers.budget import RECORD
from gptoss_convert.containers.paths import read_text, safe_name
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.engine import anomalies
from gptoss_convert.engine.fingerprint import by_layer, listing
from gptoss_convert.engine.records import Done, Region
from gptoss_convert.engine.steps import Plan
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.checkpoint import MANIFEST
from gptoss_convert.layouts.model import load_model

NAME = MANIFEST
SCHEMA = 1


@dataclass(frozen=True)
class Manifest:
    """A manifest found in a directory, its form checked."""

    tool: str
    files: Mapping[str, tuple[int, int]]
    """Size and CRC-32 by path relative to the manifest's directory."""
    layers: Mapping[str, tuple[int, ...]]
    """Fingerprints of each layer, by weight."""


def read_manifest(root: Path) -> Manifest | None:
    """The manifest of a directory, None without one.

    Raises InputError for a schema of another version, IntegrityError for a malformed file.
    """
    path = root / NAME
    if not path.exists() and not path.is_symlink():
        return None
    content = parse_object(str(path), read_text(root, NAME, RECORD.nbytes))
    if content.get("schema") != SCHEMA:
        found = content.get("schema")
        raise InputError(f"{path}: schema {found!r:.40}, this version reads {SCHEMA}")
    files, parameters = content.get("files"), content.get("parameters")
    if not isinstance(files, dict) or not isinstance(parameters, dict):
        raise IntegrityError(f"{path}: no files or no parameters")
    return Manifest(
        str(content.get("tool")),
        {name: _listed_file(path, name, entry) for name, entry in files.items()},
        {weight: _listed_layers(path, weight, entry) for weight, entry in parameters.items()},
    )


def _listed_file(path: Path, name: str, entry: Any) -> tuple[int, int]:
    size = entry.get("bytes") if isinstance(entry, dict) else None
    crc = _number(entry.get("crc32"), 8) if isinstance(entry, dict) else None
    if not safe_name(name, folders=True):
        raise InputError(f"{path}: file name {name!r:.80} leaves the directory")
    if type(size) is not int or size < 0 or crc is None:
        raise IntegrityError(f"{path}: {name}: expects bytes and crc32, found {entry!r:.80}")
    return size, crc


def _listed_layers(path: Path, weight: str, entry: Any) -> tuple[int, ...]:
    texts = entry.get("layers") if isinstance(entry, dict) else None
    layers = [_number(text, 16) for text in texts] if isinstance(texts, list) else [None]
    numbers = tuple(layer for layer in layers if layer is not None)
    if len(numbers) != len(layers):
        raise IntegrityError(f"{path}: {weight:.80}: expects fingerprints, found {entry!r:.80}")
    return numbers


def _number(text: Any, digits: int) -> int | None:
    """The number that so many hexadecimal digits stand for."""
    plain = isinstance(text, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", text)
    return int(text, 16) if plain else None


def manifest(
    header: Mapping[str, Any],
    image: Image,
    plan: Plan,
    done: Mapping[int, Done],
    small: Mapping[str, int],
) -> bytes:
    """The manifest's text: sorted, the same for the same conversion.

    `small` are the CRC-32 of the closing files, as they were written.
    """
    regions: dict[str, list[Region]] = defaultdict(list)
    for result in done.values():
        for region in result.regions:
            regions[region.file].append(region)
    files = {
        file.name: {"bytes": file.size, "crc32": f"{_file_crc(file, regions[file.name]):08x}"}
        for file in image.files
    }
    for name, content in image.closing:
        files[name] = {"bytes": content_size(content), "crc32": f"{small[name]:08x}"}
    layers = by_layer(plan, ((result.step, result.fingerprint) for result in done.values()))
    content = {
        "schema": SCHEMA,
        **header,
        "files": files,
        "parameters": {weight: listing(found) for weight, found in layers.items()},
        **_scales(plan, done.values()),
        "oddities": anomalies.summary(plan, {n: result.anomalies for n, result in done.items()}),
    }
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _file_crc(file: FileImage, regions: Iterable[Region]) -> int:
    """CRC-32 of a file from those of its regions, its fixed bytes, and the zeros between them."""
    parts = [(region.offset, region.length, region.crc) for region in regions]
    parts += [(at, len(content), isal_zlib.crc32(content)) for at, content in file.fixed]
    return joined_crc(file.name, file.size, parts, lambda _, length: isal_zlib.crc32(bytes(length)))


def joined_crc(
    name: str, size: int, parts: Iterable[tuple[int, int, int]], gap: Callable[[int, int], int]
) -> int:
    """CRC-32 of a file from those of its (offset, length, CRC) and of the gaps between them."""
    crc = end = 0
    for offset, length, part in (*sorted(parts), (size, 0, 0)):
        if offset < end:
            raise AssertionError(f"{name}: byte {offset} belongs to two parts")
        if offset > end:
            crc = isal_zlib.crc32_combine(crc, gap(end, offset - end), offset - end)
        crc = isal_zlib.crc32_combine(crc, part, length) if length else crc
        end = offset + length
    return crc


def _scales(plan: Plan, done: Iterable[Done]) -> dict[str, dict[str, dict[str, Any]]]:
    """Statistics of blocks and scales that are read or written, by codec and weight."""
    found: dict[str, dict[str, ScaleStatistics]] = {name: {} for name in load_model().codecs}
    for result in done:
        recipe = plan.steps[result.step].recipe
        if recipe.measured is not None and result.scales.blocks:
            weights, weight = found[recipe.measured.codec.name], recipe.family.weight
            weights[weight] = weights.get(weight, ScaleStatistics()) + result.scales
    return {
        codec: {
            weight: {
                "blocks": scales.blocks,
                "zero_blocks": scales.zero_blocks,
                "ambiguous_blocks": scales.low_blocks,
                "min_scale": scales.min_scale,
                "max_scale": scales.max_scale,
            }
            for weight, scales in weights.items()
        }
        for codec, weights in found.items()
    }

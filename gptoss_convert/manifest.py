"""The manifest `gptoss-convert.json`: what TARGET holds, by file and by parameter."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from isal import isal_zlib

from gptoss_convert import oddities
from gptoss_convert.checkpoint import MANIFEST
from gptoss_convert.containers import FileImage, Image
from gptoss_convert.execute import Done, Region
from gptoss_convert.fingerprint import ScaleStatistics, combine
from gptoss_convert.steps import Plan

NAME = MANIFEST
SCHEMA = 1


def manifest(
    header: Mapping[str, Any], image: Image, plan: Plan, done: Mapping[int, Done]
) -> bytes:
    """The manifest's text: sorted, the same for the same conversion."""
    regions: dict[str, list[Region]] = defaultdict(list)
    for result in done.values():
        for region in result.regions:
            regions[region.file].append(region)
    files = {
        file.name: {"bytes": file.size, "crc32": f"{_file_crc(file, regions[file.name]):08x}"}
        for file in image.files
    }
    for name, content in image.closing:
        crc = isal_zlib.crc32(content)
        files[name] = {"bytes": len(content), "crc32": f"{crc:08x}"}
    content = {
        "schema": SCHEMA,
        **header,
        "files": files,
        "parameters": _parameters(plan, done.values()),
        "mxfp4": _scales(plan, done.values()),
        "oddities": oddities.summary(plan, {n: result.oddities for n, result in done.items()}),
    }
    return (json.dumps(content, indent=1, sort_keys=True) + "\n").encode()


def _file_crc(file: FileImage, regions: Iterable[Region]) -> int:
    """CRC-32 of a file from those of its regions, its fixed bytes, and the zeros between them."""
    parts = [(region.offset, region.length, region.crc) for region in regions]
    parts += [(at, len(content), isal_zlib.crc32(content)) for at, content in file.fixed]
    crc = end = 0
    for offset, length, part in (*sorted(parts), (file.size, 0, 0)):
        if offset < end:
            raise AssertionError(f"{file.name}: byte {offset} was written twice")
        if offset > end:
            crc = isal_zlib.crc32(bytes(offset - end), crc)
        crc = isal_zlib.crc32_combine(crc, part, length) if length else crc
        end = offset + length
    return crc


def _parameters(plan: Plan, done: Iterable[Done]) -> dict[str, dict[str, Any]]:
    """Fingerprints by weight: of the whole parameter and of each layer."""
    shares: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for result in done:
        step = plan.steps[result.step]
        if result.fingerprint is not None:
            layers = shares[step.family.weight]
            layers[step.layer] = (layers[step.layer] + result.fingerprint) & ((1 << 64) - 1)
    return {weight: fingerprints(layers) for weight, layers in shares.items()}


def fingerprints(layers: Mapping[int, int]) -> dict[str, Any]:
    """The fingerprint of a parameter and of its layers, as text."""
    ordered = [layers[layer] for layer in sorted(layers)]
    return {
        "fingerprint": f"{combine(ordered):016x}",
        "layers": [f"{part:016x}" for part in ordered],
    }


def _scales(plan: Plan, done: Iterable[Done]) -> dict[str, dict[str, Any]]:
    """Statistics of the MXFP4 scales, by weight."""
    found: dict[str, ScaleStatistics] = defaultdict(ScaleStatistics)
    for result in done:
        if result.scales.blocks:
            found[plan.steps[result.step].family.weight] += result.scales
    return {
        weight: {
            "blocks": scales.blocks,
            "zero_blocks": scales.zero_blocks,
            "ambiguous_blocks": scales.low_blocks,
            "min_scale": scales.min_scale,
            "max_scale": scales.max_scale,
        }
        for weight, scales in found.items()
    }

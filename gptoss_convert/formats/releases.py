"""Published releases: the sizes and SHA-256 of their files, and whether a directory is one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.containers.paths import open_inside

_PIECE = 4 << 20


@dataclass(frozen=True)
class Release:
    """Weight files as published; sizes and SHA-256 as the Hub's LFS pointers state them."""

    name: str
    files: Mapping[str, tuple[int, str]]


_RELEASES = (
    Release(
        "openai/gpt-oss-20b",
        {
            "model-00000-of-00002.safetensors": (
                4792272488,
                "16d0f997dcfc4462089d536bffe51b4bcea2f872f5c430be09ef8ed392312427",
            ),
            "model-00001-of-00002.safetensors": (
                4798702184,
                "4fbe328ab445455d6f58dc73852b85873bd626986310abd91cd4d2ce3245eaea",
            ),
            "model-00002-of-00002.safetensors": (
                4170342232,
                "a18106b209e9ab35c3406db4f6f12a927364a058b21e9d1373d682e20674b303",
            ),
        },
    ),
    Release(
        "openai/gpt-oss-20b original/",
        {
            "model.safetensors": (
                13761300984,
                "3340a61d1a0391e8c5b5d3463d18d4c48129a84bbc04a554c762c99020aa06ed",
            ),
        },
    ),
)


def of_sizes(sizes: Mapping[str, int]) -> Release | None:
    """The release whose weight files have these names and sizes."""
    for release in _RELEASES:
        if {name: size for name, (size, _) in release.files.items()} == sizes:
            return release
    return None


def differing(release: Release, root: Path) -> list[str]:
    """The weight files of a directory whose SHA-256 is not the published one."""
    return [name for name, (_, digest) in release.files.items() if _sha256(root, name) != digest]


def _sha256(root: Path, name: str) -> str:
    digest = hashlib.sha256()
    with open_inside(root, name) as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()

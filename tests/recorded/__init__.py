"""Recorded files of other programs; README.md says what each is."""

from __future__ import annotations

import tarfile
from pathlib import Path


def unpack(archive: str, folder: Path) -> Path:
    """Unpack an archive of this directory into `folder`, and return it."""
    with tarfile.open(Path(__file__).parent / archive) as tar:
        tar.extractall(folder, filter="data")
    return folder

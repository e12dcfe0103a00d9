"""What a TARGET must be for its own check to accept it, known before the first byte."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath

from gptoss_convert.containers import Image
from gptoss_convert.containers.budget import RECORD, TEXT
from gptoss_convert.containers.paths import safe_name
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError
from gptoss_convert.formats.checkpoint import CONFIG, MANIFEST


def require_acceptable(image: Image) -> None:
    """Refuse a plan whose TARGET `check` would refuse; raises InputError and IntegrityError."""
    names = [*(file.name for file in image.files), *(name for name, _ in image.closing), MANIFEST]
    for problem in _names(names):
        raise InputError(f"TARGET: {problem}; rename it in SOURCE, or move it away")
    for name, content in image.closing:
        if isinstance(content, bytes) and name.endswith(".json"):
            budget = TEXT if PurePath(name).name == CONFIG else RECORD
            if len(content) > budget.nbytes:
                raise InputError(f"TARGET: {name}: {len(content)} bytes, at most {budget.nbytes}")
            parse_object(f"TARGET: {name}", content.decode(), budget)


def _names(names: list[str]) -> Iterator[str]:
    """What is wrong with the names of files that one directory is to hold."""
    folders = {str(parent) for name in names for parent in PurePath(name).parents}
    seen: set[str] = set()
    for name in names:
        if not safe_name(name, folders=True):
            yield f"{name!r:.80} is no name for a file on every system"
        if name in folders:
            yield f"{name} would be a file and a folder"
        if name in seen:
            yield f"{name} would be two files"
        seen.add(name)

"""The formats that there are; opening a directory of any of them."""

from __future__ import annotations

from pathlib import Path

from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats import unsupported
from gptoss_convert.formats.checkpoint import DEFAULT, Checkpoint, Choices, Format
from gptoss_convert.formats.hf import HF
from gptoss_convert.formats.megatron.format import MEGATRON
from gptoss_convert.formats.openai import OPENAI

FORMATS: dict[str, Format] = {one.name: one for one in (HF, OPENAI, MEGATRON)}
"""By name. A new format is a module that says what it is, and its name here."""


def formats_in(path: Path) -> dict[str, Path]:
    """The formats that a directory holds, by name, and the folder each lies in."""
    if not path.is_dir():
        what = "not a directory" if path.exists() else "no such directory"
        raise UsageError(f"{path}: {what}")
    places = {name: one.recognise(path) for name, one in FORMATS.items()}
    return {name: place for name, place in places.items() if place is not None}


def open_checkpoint(path: Path, choices: Choices = DEFAULT) -> Checkpoint:
    """Open a directory, header by header.

    Raises UsageError with the choices, InputError or IntegrityError with file and tensor.
    """
    found = formats_in(path)
    format = choices.format
    if format is None:
        if len(found) > 1:
            raise UsageError(f"{path}: holds {' and '.join(found)}; choose one with --from")
        format = next(iter(found), None)
    if format is None or format not in found:
        problem = unsupported.recognise_files(path)
        held = f"holds {', '.join(found)}" if found else "no config.json and no torch_dist tracker"
        raise problem or InputError(f"{path}: not a GPT-OSS checkpoint: {held}")
    opened = FORMATS[format].open(found[format], choices)
    if choices.strict and opened.notes:
        raise IntegrityError(f"{opened.notes[0]} (--strict)")
    return opened

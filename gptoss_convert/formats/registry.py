"""The formats that there are; opening a directory of any of them."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path

from gptoss_convert import formats
from gptoss_convert.containers.paths import Followed, folder_inside, settled
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats import unsupported
from gptoss_convert.formats.checkpoint import CONFIG, DEFAULT, Checkpoint, Choices, Format


def _found() -> Iterator[Format]:
    """What every module beside this one declares as its FORMAT."""
    for module in pkgutil.iter_modules(formats.__path__):
        name = f"{formats.__name__}.{module.name}"
        if name != __name__ and (one := getattr(import_module(name), "FORMAT", None)):
            yield one


FORMATS: dict[str, Format] = {
    one.name: one for one in sorted(_found(), key=lambda one: (not one.published, one.name))
}
"""By name, those that OpenAI published models in first. A new format is a new module."""


def formats_in(path: Path) -> dict[str, Path]:
    """The formats that a directory holds, by name, and the folder each lies in."""
    if not path.is_dir():
        what = "not a directory" if path.exists() else "no such directory"
        raise UsageError(f"{path}: {what}")
    places = {name: one.recognise(path) for name, one in FORMATS.items()}
    found = {name: place for name, place in places.items() if place is not None}
    if len(found) < 2:
        return found
    # A config.json without weights of its own lies there for those that something else holds.
    return {name: place for name, place in found.items() if not _bare(FORMATS[name], place)}


def _bare(format: Format, place: Path) -> bool:
    """Whether a folder is a format's by its config.json alone."""
    mine = format.written and format.table.container == "safetensors"
    return mine and not any(place.glob("*.safetensors*"))


def _require_own(path: Path, kind: Format, choices: Choices) -> None:
    """Refuse a choice that only another format has: whoever makes it means another checkpoint."""
    for other in FORMATS.values():
        for name in other.own if other is not kind else ():
            if getattr(choices, name) != getattr(DEFAULT, name):
                flag = f"--{name.replace('_', '-')}"
                raise UsageError(f"{path}: {flag} is for {other.name}, this is {kind.name}")


def open_checkpoint(path: Path, choices: Choices = DEFAULT) -> Checkpoint:
    """Open a directory, header by header.

    Raises UsageError with the choices, InputError or IntegrityError with file and tensor.
    """
    path = Followed(path) if choices.follow_links else settled(path)
    if choices.config and not choices.config.exists():
        raise UsageError(f"--config {choices.config}: no such file")
    if choices.config and choices.config.is_dir():
        choices = replace(choices, config=choices.config / CONFIG)
    found = formats_in(path)
    if not found and choices.config and any(path.glob("*.safetensors")):
        # Whoever names a Hugging Face config.json says whose weights these are.
        found = {"hf": path}
    format = choices.format
    if format is None:
        if len(found) > 1:
            raise UsageError(f"{path}: holds {' and '.join(found)}; choose one with --from")
        format = next(iter(found), None)
    if format is not None and found and format not in found:
        raise UsageError(
            f"{path}: --from {format}: holds {' and '.join(found)}; name one of these, or omit it"
        )
    if format is None or format not in found:
        problem = unsupported.recognise_files(path, claimed=bool(found))
        held = f"holds {', '.join(found)}" if found else "no weights in a known form"
        raise problem or InputError(f"{path}: not a GPT-OSS checkpoint: {held}")
    place = folder_inside(path, found[format].relative_to(path).as_posix())
    if place is None:
        raise IntegrityError(f"{found[format]}: gone meanwhile")
    _require_own(path, FORMATS[format], choices)
    opened = replace(FORMATS[format].open(place, choices), cast=choices.cast)
    if choices.strict and opened.notes:
        where = "" if opened.notes[0].startswith(f"{path}") else f"{path}: "
        raise IntegrityError(f"{where}{opened.notes[0]} (--strict)")
    return opened

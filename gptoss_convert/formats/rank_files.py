"""One pickled state dict for each rank: verl, SkyRL, and accelerate without a distributed format.

Sources: verl's FSDPCheckpointManager, SkyRL's, accelerate's `save_fsdp_model`. Each file holds that
rank's parts of all tensors, as DTensor or ShardedTensor; together they tile the model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from gptoss_convert.containers.paths import lies, read_text
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, read_only
from gptoss_convert.formats.torch_files import open_files
from gptoss_convert.formats.trained import Form, Place
from gptoss_convert.layouts.table_files import load_table

_RANKS = (
    re.compile(r"model_world_size_(?P<world>\d{1,6})_rank_(?P<rank>\d{1,6})\.pt"),
    re.compile(r"pytorch_model_fsdp_\d{1,3}_rank(?P<rank>\d{1,6})\.bin"),
)
_SETTINGS = "fsdp_config.json"
_HARMLESS = frozenset({"FSDP_version"})
"""Keys of it that change nothing: each file says itself how its tensors were cut."""
_MAX_TEXT = 1 << 16
_SHOWN = 8


def _named(folder: Path) -> dict[str, re.Match[str]]:
    """The rank files of a folder, those of one of the patterns, by name."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    for pattern in _RANKS:
        if found := {name: match for name in names if (match := pattern.fullmatch(name))}:
            return found
    return {}


def rank_files(folder: Path) -> tuple[str, ...]:
    """The files of all ranks, in their order; raises IntegrityError for two saves, and for ranks
    that are missing."""
    found = _named(folder)
    worlds = {int(m["world"]) for m in found.values() if "world" in m.re.groupindex}
    if len(worlds) > 1:
        counts = " and of ".join(map(str, sorted(worlds)))
        raise IntegrityError(f"{folder}: files of {counts} ranks: two saves; move one away")
    by_rank = {int(match["rank"]): name for name, match in found.items()}
    if len(by_rank) < len(found):
        raise IntegrityError(f"{folder}: two files of one rank, such as {next(iter(found))}")
    world = next(iter(worlds), max(by_rank) + 1)
    if lost := sorted({*range(world)} - by_rank.keys()):
        shown = ", ".join(map(str, lost[:_SHOWN])) + ", .." * (len(lost) > _SHOWN)
        raise IntegrityError(f"{folder}: files of {len(lost)} of {world} ranks missing: {shown}")
    if max(by_rank) >= world:
        raise IntegrityError(f"{folder}: a file of rank {max(by_rank)}, of {world}")
    return tuple(name for _, name in sorted(by_rank.items()))


FORM = Form(
    "files of single ranks",
    (
        Place("actor", "verl"),
        Place("policy", "SkyRL"),
        Place("", "verl, SkyRL or accelerate"),
    ),
    lambda folder: bool(_named(folder)),
)


def _open(folder: Path, choices: Choices) -> Checkpoint:
    files = rank_files(folder)
    _check_settings(folder, len(files))
    beside = {"optimizer file": len([*folder.glob("optim*.pt")])}
    return open_files(FORMAT, FORM, folder, files, choices, beside)


def _check_settings(folder: Path, ranks: int) -> None:
    """verl's own note of the save: each key is compared, or known to be harmless."""
    if not lies(folder, _SETTINGS):
        return
    place = str(folder / _SETTINGS)
    said: Mapping[str, object] = parse_object(place, read_text(folder, _SETTINGS, _MAX_TEXT))
    for key, value in said.items():
        if key == "world_size" and value != ranks:
            raise IntegrityError(f"{place}: world_size is {value!r:.40}, found {ranks} rank files")
        if key not in {"world_size", *_HARMLESS}:
            raise InputError(f"{place}: {key} is not known here: {value!r:.80}")


FORMAT = read_only("rank-files", partial(load_table, "hf"), FORM.recognise, _open)

"""Whole models in files of `torch.save`: `pytorch_model.bin`, its shards, `model.pt`.

No pickle is executed: tensors are located in the files and read in place.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from gptoss_convert.containers import torch_saves
from gptoss_convert.containers.paths import lies, read_text, safe_name
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, Format, read_only
from gptoss_convert.formats.names import kind_of, read_names
from gptoss_convert.formats.trained import Form, Place, open_trained, trainer_tables
from gptoss_convert.layouts.table_files import load_table

_INDEX = "pytorch_model.bin.index.json"
_SINGLE = (
    *("pytorch_model.bin", "pytorch_model_fsdp.bin", "model.bin"),
    *("model.pt", "model.pth", "consolidated.pt", "consolidated.00.pth"),
)
"""Files that hold a whole model, by name."""
_MAX_INDEX = 100_000_000


def holds(folder: Path) -> bool:
    """Whether a folder's weights are such files, and nothing else."""
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return False
    return any(lies(folder, name) for name in (_INDEX, *_SINGLE))


def _files(folder: Path) -> tuple[str, ...]:
    """The files of the model; raises IntegrityError for two models and for missing shards."""
    found = [name for name in (_INDEX, *_SINGLE) if lies(folder, name)]
    if len(found) > 1:
        raise IntegrityError(
            f"{folder}: holds {len(found)} models: {', '.join(found)}; move all but one away"
        )
    if found != [_INDEX]:
        return tuple(found)
    place = folder / _INDEX
    shards = parse_object(str(place), read_text(folder, _INDEX, _MAX_INDEX)).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise IntegrityError(f"{place}: no weight_map")
    for tensor, name in shards.items():
        if not isinstance(name, str) or not safe_name(name):
            raise InputError(f"{place}: {tensor}: file name {name!r:.80} leaves the directory")
    names = sorted({*shards.values()})
    if lost := [name for name in names if not (folder / name).exists()]:
        raise IntegrityError(f"{place}: {len(lost)} of {len(names)} shards missing: {lost[0]}")
    return tuple(names)


FORM = Form("weights in files of torch.save", (Place("", "torch.save"),), holds)


def _open(folder: Path, choices: Choices) -> Checkpoint:
    return open_files(FORMAT, FORM, folder, _files(folder), choices, {})


def open_files(
    kind: Format,
    form: Form,
    folder: Path,
    files: Sequence[str],
    choices: Choices,
    beside: Mapping[str, int],
) -> Checkpoint:
    """The checkpoint that these files hold together; `beside` counts what lies there and is none of
    its weights. Raises as `open_trained` does."""
    stored = torch_saves.read(folder, files, lambda name: kind_of(name, choices.drop))
    names = read_names(str(folder), stored.names, trainer_tables(), choices.drop)
    skipped = Counter(names.skipped) + Counter(beside) + Counter(other=stored.values)
    opened = open_trained(kind, form, folder, names, stored.chunks, choices, dict(skipped))
    more = {"files": len(files), "replicas": stored.replicas}
    return replace(opened, details={**opened.details, **more})


FORMAT = read_only("torch-save", partial(load_table, "hf"), FORM.recognise, _open)

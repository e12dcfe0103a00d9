"""Whole models in files of `torch.save`: `pytorch_model.bin`, its shards, `model.pt`.

No pickle is executed: tensors are located in the files and read in place. The container's code is
loaded where there is such a file: few checkpoints are of this form.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.containers.paths import lies, read_text, safe_name
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, Format, read_only
from gptoss_convert.formats.names import kind_of, read_names
from gptoss_convert.formats.trained import Form, Place, open_trained, trainer_tables
from gptoss_convert.layouts.table_files import load_table

if TYPE_CHECKING:
    from gptoss_convert.containers.torch_saves import Merged

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


def _read_index(folder: Path) -> dict[str, str] | None:
    """The file of each tensor by its name, None without an index."""
    if not lies(folder, _INDEX):
        return None
    place = folder / _INDEX
    shards = parse_object(str(place), read_text(folder, _INDEX, _MAX_INDEX)).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise IntegrityError(f"{place}: no weight_map")
    for tensor, name in shards.items():
        if not isinstance(name, str) or not safe_name(name):
            raise InputError(f"{place}: {tensor}: file name {name!r:.80} leaves the directory")
    return shards


def _files(folder: Path, index: Mapping[str, str] | None) -> tuple[str, ...]:
    """The files of the model; raises IntegrityError for two models and for missing shards."""
    found = [name for name in (_INDEX, *_SINGLE) if lies(folder, name)]
    if len(found) > 1:
        raise IntegrityError(
            f"{folder}: holds {len(found)} models: {', '.join(found)}; move all but one away"
        )
    if index is None:
        return tuple(found)
    names = sorted({*index.values()})
    if lost := [name for name in names if not (folder / name).exists()]:
        raise IntegrityError(
            f"{folder / _INDEX}: {len(lost)} of {len(names)} shards missing: {', '.join(lost)}"
        )
    return tuple(names)


def _require_one_home(folder: Path, stored: Merged, index: Mapping[str, str] | None) -> None:
    """Each tensor lies in one file, in that which the index names."""
    for tensor, files in stored.homes.items():
        if len(files) > 1:
            where = " and again in ".join(files)
            raise IntegrityError(f"{folder}: {tensor}: stored in {where}")
    if index is None:
        return
    homes = {tensor: files[0] for tensor, files in stored.homes.items()}
    for tensor, name in index.items():
        if (found := homes.get(tensor, "nowhere")) != name:
            raise IntegrityError(f"{folder / _INDEX}: {tensor}: expected in {name}, found {found}")
    for tensor, name in homes.items():
        if tensor not in index:
            raise IntegrityError(f"{folder / _INDEX}: {tensor} of {name} is not in the index")


FORM = Form("weights in files of torch.save", (Place("", "torch.save"),), holds)


def _open(folder: Path, choices: Choices) -> Checkpoint:
    index = _read_index(folder)
    files = _files(folder, index)
    opened = open_files(FORMAT, FORM, folder, files, choices, {}, index)
    others = sorted({path.name for path in folder.glob("pytorch_model*.bin")} - {*files})
    note = f"{folder / (_INDEX if index else files[0])}: beside it {', '.join(others)}: not read"
    return replace(opened, notes=(*opened.notes, *[note] * bool(others)))


def open_files(
    kind: Format,
    form: Form,
    folder: Path,
    files: Sequence[str],
    choices: Choices,
    beside: Mapping[str, int],
    index: Mapping[str, str] | None = None,
) -> Checkpoint:
    """The checkpoint that these files hold together; `beside` counts what lies there and is none of
    its weights. Raises as `open_trained` does."""
    from gptoss_convert.containers import torch_saves

    stored = torch_saves.read(folder, files, lambda name: kind_of(name, choices.drop))
    if form is FORM:
        # Ranks hold parts of one tensor; whole models hold each of theirs once.
        _require_one_home(folder, stored, index)
    names = read_names(str(folder), stored.names, trainer_tables(), choices.drop)
    skipped = Counter(names.skipped) + Counter(beside) + Counter(other=stored.values)
    opened = open_trained(kind, form, folder, names, stored.chunks, choices, dict(skipped))
    more = {"files": len(files), "replicas": stored.replicas}
    return replace(opened, details={**opened.details, **more})


FORMAT = read_only("torch-save", partial(load_table, "hf"), FORM.recognise, _open)

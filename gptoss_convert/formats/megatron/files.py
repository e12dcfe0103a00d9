"""The files of a Megatron checkpoint besides those of torch_dist, and where they may lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gptoss_convert.containers.budget import YAML
from gptoss_convert.containers.iterations import RELEASE
from gptoss_convert.containers.paths import folder_inside, lies, read_text
from gptoss_convert.errors import InputError
from gptoss_convert.formats.carried import carried_files
from gptoss_convert.formats.checkpoint import CONFIG

RUN_CONFIG = "run_config.yaml"
ITERATION = 1
"""Megatron-LM and Megatron-Bridge refuse iteration 0."""
TRACKER = "latest_checkpointed_iteration.txt"
LEGACY = "model_optim_rng.pt"
"""In a folder for each rank: the format before torch_dist."""
NEMO_WEIGHTS = "weights"
"""Where NeMo 2 puts its torch_dist, beside `context/`."""
HF_FOLDER = "hf"
"""Where a Megatron checkpoint carries config.json, tokenizer and template for the way back.

In the root it is ours; in an iteration it is Megatron-Bridge's, with also_save_hf_checkpoint."""
TOKENIZER_FOLDER = "tokenizer"
"""Where Megatron-Bridge saves the tokenizer, in an iteration."""


def is_legacy(directory: Path) -> bool:
    """Whether an iteration's directory is of the format before torch_dist."""
    return directory.is_dir() and any(directory.glob(f"mp_rank_*/{LEGACY}"))


def root_of(iteration: Path) -> Path:
    """The directory that holds an iteration: its parent, or itself under another name."""
    named = iteration.name.startswith("iter_") or iteration.name == RELEASE
    return iteration.parent if named else iteration


def hf_folders(iteration: Path, base: Path) -> list[Path]:
    """The Hugging Face folders of a checkpoint in `base`; that of the iteration itself first."""
    places = dict.fromkeys((iteration, base))
    found = (folder_inside(place, HF_FOLDER) for place in places)
    return [folder for folder in found if folder is not None]


def hf_config(iteration: Path, base: Path) -> Path | None:
    """The config.json that a checkpoint carries."""
    found = (folder for folder in hf_folders(iteration, base) if lies(folder, CONFIG))
    return next((folder / CONFIG for folder in found), None)


def carried(iteration: Path, base: Path) -> tuple[Path, ...]:
    """The files of the Hugging Face side that a checkpoint carries, one of each name."""
    files: dict[str, Path] = {}
    tokenizer = folder_inside(iteration, TOKENIZER_FOLDER)
    for folder in (*hf_folders(iteration, base), *filter(None, [tokenizer])):
        for path in carried_files(folder):
            files.setdefault(path.name, path)
    return tuple(files[name] for name in sorted(files))


def read_run_config(iteration: Path) -> dict[str, Any] | None:
    """The `model` section of Megatron-Bridge's run_config.yaml as plain data, None without one."""
    # yaml is read only where there is some: it takes a while to import.
    from gptoss_convert.containers.plain_yaml import parse_yaml

    path = iteration / RUN_CONFIG
    if not lies(iteration, RUN_CONFIG):
        return None
    content = parse_yaml(str(path), read_text(iteration, RUN_CONFIG, YAML.nbytes))
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"{path}: no 'model' section")
    return model

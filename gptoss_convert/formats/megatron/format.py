"""Megatron's torch_dist as a format: recognised by its tracker, written as one iteration."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import replace
from functools import partial
from pathlib import Path

from gptoss_convert.containers import Image, torch_dist
from gptoss_convert.containers.paths import folder_inside
from gptoss_convert.containers.torch_dist import RELEASE
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats import carried, dcp, shards
from gptoss_convert.formats import config as configs
from gptoss_convert.formats.checkpoint import CONFIG, Checkpoint, Choices, Format
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.megatron import legacy, state
from gptoss_convert.formats.megatron.files import (
    HF_FOLDER,
    ITERATION,
    NEMO_WEIGHTS,
    RUN_CONFIG,
    TRACKER,
)
from gptoss_convert.formats.megatron.launch import LAUNCH, launch_page, launch_words
from gptoss_convert.formats.megatron.opening import open_megatron
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table

_MARKERS = frozenset((TRACKER, ".metadata", "metadata.json"))
_FILES = 8
"""About how many `.distcp` files hold the weights: loaders read them side by side."""
_MIN_BYTES = 2_000_000_000
"""No `.distcp` file is limited below this: the largest tensor is one chunk."""


def _recognise(path: Path) -> Path | None:
    # verl's and SkyRL's trackers have the name of Megatron's.
    if dcp.is_nested(path) or any(path.glob("global_step_*")):
        return None
    of_nemo = folder_inside(path, NEMO_WEIGHTS)
    if of_nemo is not None and (of_nemo / "metadata.json").exists():
        return of_nemo
    marked = any((path / name).exists() for name in _MARKERS) or any(path.glob("iter_*"))
    marked = marked or legacy.is_legacy(path)
    return path if marked or (path / RELEASE / ".metadata").exists() else None


def _listed(names: Set[str]) -> Set[str]:
    marked = names & _MARKERS or any(name.startswith("iter_") for name in names)
    if marked:
        raise UsageError("torch_dist is read from a directory only")
    return frozenset()


def _variant(encoding: str, options: ImageOptions) -> str:
    if options.dtype == "mxfp4":
        raise UsageError("--to megatron --dtype mxfp4: Megatron's layout has BF16 experts only")
    return options.layout + ("-both" if options.also_local_spec else "")


def _image(source: Checkpoint, variant: str, options: ImageOptions) -> tuple[Image, list[str]]:
    table = FORMAT.table
    config = source.config
    _require_sayable(config)
    sizes = load_model().sizes(config.numbers)
    iteration = torch_dist.image(
        shards.specs_of(table.tensors(variant, sizes)),
        torch_dist.extra_state_objects(table.object_names(variant, sizes)),
        state.common_state(config, options.layout),
        files=_FILES,
        max_file_bytes=max(options.max_shard_size, _MIN_BYTES),
    )
    folder = f"iter_{ITERATION:07d}/"
    side = carried.sidecar_image(source, variant, options)
    copies, notes = carried.copies(source, options)
    text = configs.hf_text(config, source.hf_config)
    *before, declared = ((folder + name, content) for name, content in iteration.closing)
    closing = (
        *((f"{HF_FOLDER}/{name}", content) for name, content in copies),
        (f"{HF_FOLDER}/{CONFIG}", text),
        *side.closing,
        (LAUNCH, launch_page(config, options.bridge).encode()),
        (folder + RUN_CONFIG, state.run_config_yaml(config, options.bridge)),
        *before,
        (TRACKER, str(ITERATION).encode()),
        # Last: metadata.json declares the checkpoint complete.
        declared,
    )
    files = (*(replace(f, name=folder + f.name) for f in iteration.files), *side.files)
    chunks = (*(replace(c, file=folder + c.file) for c in iteration.chunks), *side.chunks)
    return Image(files, chunks, closing), notes


def _require_sayable(config: Config) -> None:
    """Refuse numbers that Megatron's fields have no way to say."""
    if config.attention_factor is not None:
        raise InputError(
            f"config: attention_factor is {config.attention_factor}, Megatron's YaRN has its own "
            f"(0.1 ln(factor) + 1)"
        )
    if not config.rope_theta.is_integer():
        raise InputError(
            f"config: rope_theta is {config.rope_theta}, Megatron's rotary_base is a whole number"
        )


def _open(root: Path, choices: Choices) -> Checkpoint:
    return open_megatron(FORMAT, root, choices)


FORMAT = Format(
    "megatron",
    partial(load_table, "megatron"),
    _recognise,
    _open,
    _listed,
    _variant,
    _image,
    side=f"{HF_FOLDER}/",
    own=("iteration", "glu_interleave", "from_main_params"),
    launch_words=launch_words,
    launch_page=launch_page,
)

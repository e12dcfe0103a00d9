"""A Megatron TARGET: one iteration of torch_dist, and what loaders need beside it."""

from __future__ import annotations

from dataclasses import replace

from gptoss_convert.containers import Image, torch_dist
from gptoss_convert.errors import InputError
from gptoss_convert.formats import carried, shards
from gptoss_convert.formats import config as configs
from gptoss_convert.formats.checkpoint import CONFIG, Checkpoint
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.megatron import state
from gptoss_convert.formats.megatron.files import HF_FOLDER, ITERATION, RUN_CONFIG, TRACKER
from gptoss_convert.formats.megatron.launch import LAUNCH, launch_page
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.tables import Table

_FILES = 8
"""About how many `.distcp` files hold the weights: loaders read them side by side."""
_MIN_BYTES = 2_000_000_000
"""No `.distcp` file is limited below this: the largest tensor is one chunk."""


def image(
    table: Table, source: Checkpoint, variant: str, options: ImageOptions
) -> tuple[Image, list[str]]:
    """The files of a TARGET of that variant, and what the user should know about them."""
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

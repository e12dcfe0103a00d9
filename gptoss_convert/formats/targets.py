"""What a target directory holds beside converted tensors, and where each file's bytes go."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

from gptoss_convert.containers import Image, safetensors, torch_dist
from gptoss_convert.containers.refs import Copied, FileRef
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import shards, sidecar
from gptoss_convert.formats.checkpoint import CONFIG, MAX_CARRIED, Checkpoint, carried_files
from gptoss_convert.formats.megatron import fields as megatron
from gptoss_convert.formats.megatron import state as megatron_state
from gptoss_convert.formats.megatron.launch import LAUNCH, launch_page
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.tables import load_table

if TYPE_CHECKING:
    from gptoss_convert.conversion.options import Options

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_DISTCP_FILES = 8
"""About how many `.distcp` files hold the weights: loaders read them side by side."""
_DISTCP_MIN_BYTES = 2_000_000_000
"""No `.distcp` file is limited below this: the largest tensor is one chunk."""
_TAGS = {"blocks": "FP4", "scales": "UE8"}


def make_image(source: Checkpoint, variant: str, options: Options) -> tuple[Image, list[str]]:
    """The target's files and chunks, and what the user should know about them."""
    return _MAKERS[options.to](source, variant, options)


def _hf_image(source: Checkpoint, variant: str, options: Options) -> tuple[Image, list[str]]:
    weights = _shards("hf", source, variant, options)
    side = _sidecar_image(source, variant, options)
    carried, notes = _carried(source, options)
    closing = [*carried, (CONFIG, _hf_config(source, variant))]
    files = (*weights.files, *side.files)
    chunks = (*weights.chunks, *side.chunks)
    # The index goes last: a reader that sees it may rely on every shard.
    return Image(files, chunks, (*closing, *side.closing, *weights.closing)), notes


def _openai_image(source: Checkpoint, variant: str, options: Options) -> tuple[Image, list[str]]:
    weights = _shards("openai", source, variant, options)
    closing = (
        (CONFIG, configs.openai_json(source.config)),
        ("dtypes.json", _dtypes_json(source)),
    )
    return Image(weights.files, weights.chunks, (*closing, *weights.closing)), []


def _megatron_image(source: Checkpoint, variant: str, options: Options) -> tuple[Image, list[str]]:
    table = load_table("megatron")
    config = source.config
    sizes = load_model().sizes(config.numbers)
    iteration = torch_dist.image(
        shards.specs_of(table.tensors(variant, sizes)),
        torch_dist.extra_state_objects(table.object_names(variant, sizes)),
        megatron_state.common_state(config, options.layout),
        files=_DISTCP_FILES,
        max_file_bytes=max(options.max_shard_size, _DISTCP_MIN_BYTES),
    )
    folder = f"iter_{megatron.ITERATION:07d}/"
    side = _sidecar_image(source, variant, options)
    carried, notes = _carried(source, options)
    hf_config = source.hf_config
    text = hf_config.encode() if hf_config else configs.hf_json(config, None, mxfp4=False)
    *state, declared = ((folder + name, content) for name, content in iteration.closing)
    closing = (
        *((f"{megatron.HF_FOLDER}/{name}", content) for name, content in carried),
        (f"{megatron.HF_FOLDER}/{CONFIG}", text),
        *side.closing,
        (LAUNCH, launch_page(config, options.bridge).encode()),
        (folder + megatron.RUN_CONFIG, megatron_state.run_config_yaml(config, options.bridge)),
        *state,
        (megatron.TRACKER, str(megatron.ITERATION).encode()),
        # Last: metadata.json declares the checkpoint complete.
        declared,
    )
    files = (*(replace(f, name=folder + f.name) for f in iteration.files), *side.files)
    chunks = (*(replace(c, file=folder + c.file) for c in iteration.chunks), *side.chunks)
    return Image(files, chunks, closing), notes


_MAKERS = {"hf": _hf_image, "openai": _openai_image, "megatron": _megatron_image}


def _carried(source: Checkpoint, options: Options) -> tuple[list[tuple[str, Copied]], list[str]]:
    """The Hugging Face side's files, from SOURCE or --tokenizer, and a note if one is missing."""
    folder = options.tokenizer
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tokenizer {folder}: no such directory")
    paths = carried_files(folder) if folder is not None else source.carried
    copies = [
        (path.name, Copied(FileRef(path.parent, path.name), path.stat().st_size)) for path in paths
    ]
    if (nbytes := sum(copied.size for _, copied in copies)) > MAX_CARRIED:
        raise InputError(
            f"{paths[0].parent}: {nbytes} bytes of files beside the weights, at most {MAX_CARRIED} "
            "are carried; move away what the model does not need"
        )
    lacking = [name for name in _TOKENIZER if name not in {path.name for path in paths}]
    note = f"no {' and no '.join(lacking)}: SOURCE has none; pass --tokenizer DIR to add them"
    return copies, [note] * bool(lacking)


def _shards(format: str, source: Checkpoint, variant: str, options: Options) -> Image:
    sizes = load_model().sizes(source.config.numbers)
    tensors = list(load_table(format).tensors(variant, sizes))
    origin = source.origin() if source.scales is not None else None
    headers = None
    if options.shards == "published":
        headers = shards.published(format, variant, source.config)
    elif options.shards == "auto":
        headers = shards.restored(format, tensors, origin)
    if headers is None:
        headers = shards.by_size(format, tensors, options.max_shard_size)
    index = shards.index_json(headers, format, origin)
    return safetensors.image(headers, (safetensors.INDEX, index) if index else None)


def _sidecar_image(source: Checkpoint, variant: str, options: Options) -> Image:
    """The sidecar, wherever BF16 is written and the scales of its MXFP4 source are known."""
    known = source.encoding == "mxfp4" or source.scales is not None
    if variant == "mxfp4" or not known or not options.keep_scales:
        return Image((), (), ())
    sizes = load_model().sizes(source.config.numbers)
    return sidecar.image(sizes, source.origin())


def _hf_config(source: Checkpoint, variant: str) -> bytes:
    """config.json of the target; the MXFP4 source's own bytes where nothing changed since."""
    base = parse_object(CONFIG, source.hf_config) if source.hf_config else None
    origin = source.origin() if source.scales is not None else None
    if variant == "mxfp4" and origin is not None and origin.format == "hf" and origin.config:
        before = parse_object(f"{sidecar.FOLDER}/{sidecar.ORIGIN}: config", origin.config)
        config = configs.from_hf(sidecar.ORIGIN, before)
        unchanged = configs.hf_json(config, before, mxfp4=False).decode()
        if source.hf_config in (origin.config, unchanged):
            return origin.config.encode()
    return configs.hf_json(source.config, base, mxfp4=variant == "mxfp4")


def _dtypes_json(source: Checkpoint) -> bytes:
    """OpenAI's dtypes.json: one line, in the order of the model."""
    sizes = load_model().sizes(source.config.numbers)
    tensors = load_table("openai").tensors("mxfp4", sizes)
    return json.dumps(
        {t.name: _TAGS.get(t.name.rpartition(".")[2], "BF16") for t in tensors}
    ).encode()

"""What a target directory holds beside converted tensors, and where each file's bytes go."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gptoss_convert import config as configs
from gptoss_convert import shards, sidecar
from gptoss_convert.checkpoint import CONFIG, Checkpoint, carried_files
from gptoss_convert.containers import Image, safetensors
from gptoss_convert.containers.paths import open_inside
from gptoss_convert.errors import UsageError
from gptoss_convert.model import load_model
from gptoss_convert.strict_json import parse_object
from gptoss_convert.tables import load_table

if TYPE_CHECKING:
    from gptoss_convert.convert import Options

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
_TAGS = {"blocks": "FP4", "scales": "UE8"}


def make_image(source: Checkpoint, variant: str, options: Options) -> tuple[Image, list[str]]:
    """The target's files and chunks, and what the user should know about them."""
    return _MAKERS[options.to](source, variant, options)


def _hf_image(source: Checkpoint, variant: str, options: Options) -> tuple[Image, list[str]]:
    weights = _shards("hf", source, variant, options)
    side = _sidecar_image(source, variant, options)
    folder = options.tokenizer
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tokenizer {folder}: no such directory")
    paths = carried_files(folder) if folder is not None else source.carried
    notes = [
        f"no {name}: SOURCE has none; pass --tokenizer DIR to add one"
        for name in _TOKENIZER
        if name not in {path.name for path in paths}
    ]
    closing = [(path.name, _read(path.parent, path.name)) for path in paths]
    closing.append((CONFIG, _hf_config(source, variant)))
    files = (*weights.files, *side.files)
    chunks = (*weights.chunks, *side.chunks)
    # The index goes last: a reader that sees it may rely on every shard.
    return Image(files, chunks, (*closing, *side.closing, *weights.closing)), notes[:1]


def _openai_image(source: Checkpoint, variant: str, options: Options) -> tuple[Image, list[str]]:
    weights = _shards("openai", source, variant, options)
    closing = (
        (CONFIG, configs.openai_json(source.config)),
        ("dtypes.json", _dtypes_json(source)),
    )
    return Image(weights.files, weights.chunks, (*closing, *weights.closing)), []


_MAKERS = {"hf": _hf_image, "openai": _openai_image}


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
    base: Mapping[str, Any] | None = None
    if source.format == "hf":
        base = parse_object(CONFIG, source.config_text)
    origin = source.origin() if source.scales is not None else None
    if variant == "mxfp4" and origin is not None and origin.format == "hf" and origin.config:
        before = parse_object(f"{sidecar.FOLDER}/{sidecar.ORIGIN}: config", origin.config)
        config = configs.from_hf(sidecar.ORIGIN, before)
        if source.config_text.encode() == configs.hf_json(config, before, mxfp4=False):
            return origin.config.encode()
    return configs.hf_json(source.config, base, mxfp4=variant == "mxfp4")


def _dtypes_json(source: Checkpoint) -> bytes:
    """OpenAI's dtypes.json: one line, in the order of the model."""
    sizes = load_model().sizes(source.config.numbers)
    tensors = load_table("openai").tensors("mxfp4", sizes)
    return json.dumps(
        {t.name: _TAGS.get(t.name.rpartition(".")[2], "BF16") for t in tensors}
    ).encode()


def _read(root: Any, name: str) -> bytes:
    with open_inside(root, name) as file:
        return file.read()

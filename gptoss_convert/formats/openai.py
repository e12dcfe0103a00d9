"""OpenAI's `original/`: safetensors in its own names, experts as MXFP4 only."""

from __future__ import annotations

import json
from collections.abc import Set
from dataclasses import replace
from functools import partial
from pathlib import Path

from gptoss_convert.containers import Image, safetensors
from gptoss_convert.containers.paths import lies
from gptoss_convert.errors import IntegrityError, UsageError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import shards, unsupported
from gptoss_convert.formats.checkpoint import CONFIG, Checkpoint, Choices, Format, read_config
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table

_FOLDER = "original"
_HF = f"hf/{CONFIG}"
"""Says what OpenAI's keys cannot, for the way back; written only if there is something to say."""
_PUBLISHED_BYTES = 10 << 30
_TAGS = {"blocks": "FP4", "scales": "UE8"}


def _recognise(path: Path) -> Path | None:
    if lies(path, f"{_FOLDER}/{CONFIG}"):
        return path / _FOLDER
    if not lies(path, CONFIG):
        return None
    keys = read_config(path)[1]
    mine = "num_experts" in keys and not {"model_type", "architectures"} & keys.keys()
    return path if mine else None


def _open(root: Path, choices: Choices) -> Checkpoint:
    _, content = read_config(root)
    config = configs.from_openai(str(root / CONFIG), content)
    chunks, headers = safetensors.read_directory(root)
    if not chunks:
        raise unsupported.no_weights(root)
    if problem := unsupported.recognise_foreign(str(root), chunks):
        raise problem
    if others := safetensors.spare(root, chunks):
        raise IntegrityError(
            f"{root}: holds two models: OpenAI's code reads every *.safetensors, also "
            f"{', '.join(others)}, which {safetensors.INDEX} does not name; move them away"
        )
    config, text = _with_hf(root, config)
    notes = (*config.notes, *safetensors.remarks(root, chunks))
    return Checkpoint(FORMAT, "mxfp4", root, config, text, chunks, headers, notes=notes)


def _with_hf(root: Path, config: Config) -> tuple[Config, str | None]:
    """The configuration with what only the config.json in hf/ can say, and that one's text.

    Raises IntegrityError where the two describe different models.
    """
    if not lies(root, _HF):
        return config, None
    text, content = read_config(root, _HF)
    found = configs.from_hf(str(root / _HF), content)
    kept = replace(config, max_position_embeddings=found.max_position_embeddings)
    if kept != replace(found, notes=()):
        raise IntegrityError(
            f"{root / _HF}: describes another model than {CONFIG} beside it; remove the wrong one"
        )
    return kept, text


def _listed(names: Set[str]) -> Set[str]:
    inside = {name for name in names if name.startswith(f"{_FOLDER}/")}
    beside = {name for name in names if "/" not in name or name == _HF}
    if f"{_FOLDER}/{CONFIG}" in inside:
        return inside
    return beside if CONFIG in beside else frozenset()


def _variant(encoding: str, options: ImageOptions) -> str:
    if options.dtype == "bf16":
        raise UsageError("--to openai --dtype bf16: OpenAI's layout has MXFP4 experts only")
    return "mxfp4"


def _image(source: Checkpoint, variant: str, options: ImageOptions) -> tuple[Image, list[str]]:
    weights = shards.image(STYLE, FORMAT.table, source, variant, options)
    closing = (
        (CONFIG, configs.openai_json(source.config)),
        ("dtypes.json", _dtypes_json(source)),
    )
    hidden, notes = _unsaid(source)
    return Image(weights.files, weights.chunks, (*hidden, *closing, *weights.closing)), notes


def _unsaid(source: Checkpoint) -> tuple[list[tuple[str, bytes]], list[str]]:
    """Hugging Face's config.json in hf/, where OpenAI's keys cannot say the longest position."""
    config = source.config
    implied = int(config.original_max_position_embeddings * config.rope_factor)
    if config.max_position_embeddings == implied:
        return [], []
    base = json.loads(source.hf_config) if source.hf_config else None
    text = configs.hf_json(config, base, mxfp4=True)
    return [(_HF, text)], [
        f"max_position_embeddings is {config.max_position_embeddings}: OpenAI's config.json has no "
        f"key for it, its code implies {implied}; {_HF} keeps it for the way back"
    ]


def _dtypes_json(source: Checkpoint) -> bytes:
    """OpenAI's dtypes.json: one line, in the order of the model."""
    sizes = load_model().sizes(source.config.numbers)
    tensors = FORMAT.table.tensors("mxfp4", sizes)
    return json.dumps(
        {t.name: _TAGS.get(t.name.rpartition(".")[2], "BF16") for t in tensors}
    ).encode()


def _published(config: Config) -> shards.Published:
    """Sorted names: one file for 20b, files of at most 10 GiB for 120b."""
    tensors = FORMAT.table.tensors("mxfp4", load_model().sizes(config.numbers))
    ordered = shards.specs_of(sorted(tensors, key=lambda t: t.name))
    limit = _PUBLISHED_BYTES if config.size == "120b" else 1 << 62
    found = shards.packed([[spec] for spec in ordered], limit)
    return dict(zip(STYLE.names(len(found)), found, strict=True))


STYLE = shards.Style("openai", "--", "", _published)
FORMAT = Format(
    "openai",
    partial(load_table, "openai"),
    _recognise,
    _open,
    _listed,
    _variant,
    _image,
    published=True,
)

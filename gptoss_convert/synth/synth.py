"""Synthetic checkpoints: the names, shapes, dtypes and files of GPT-OSS, made-up weights.

A synthetic model is a checkpoint that lies nowhere: its tensors are computed where a plan reads
them. So every format is written by the same engine as a conversion, holds the same model, and a
20b takes as long as the disk needs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import Conversion, plan_opened
from gptoss_convert.conversion.run import Report, run
from gptoss_convert.conversion.target import check_target
from gptoss_convert.errors import UsageError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import hf
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.option import require_words
from gptoss_convert.formats.registry import FORMATS
from gptoss_convert.machine.progress import SILENT, Progress
from gptoss_convert.synth.options import SynthOptions
from gptoss_convert.synth.values import SyntheticBytes, tensors_of

MAX_LAYERS = 36
"""Layers of the largest released model."""
_RELEASED = Config(
    num_hidden_layers=24,
    num_local_experts=32,
    num_experts_per_tok=4,
    hidden_size=2880,
    intermediate_size=2880,
    num_attention_heads=64,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=201088,
    sliding_window=128,
    max_position_embeddings=131072,
    original_max_position_embeddings=4096,
    swiglu_limit=7.0,
    rms_norm_eps=1e-05,
    rope_theta=150000.0,
    rope_factor=32.0,
    beta_fast=32.0,
    beta_slow=1.0,
)
_TINY = replace(
    _RELEASED,
    num_hidden_layers=4,
    num_local_experts=8,
    hidden_size=224,
    intermediate_size=160,
    num_attention_heads=15,
    num_key_value_heads=3,
    head_dim=32,
    vocab_size=288,
    sliding_window=16,
    max_position_embeddings=4096,
    original_max_position_embeddings=128,
    # At the released 32 the ramp of YaRN would begin below the first frequency.
    beta_fast=8.0,
)
MODELS: Mapping[str, Config] = {
    "tiny": _TINY,
    "20b": _RELEASED,
    "120b": replace(_RELEASED, num_hidden_layers=36, num_local_experts=128),
}
"""By name. No two axes of `tiny` are equally long, so that a mistaken transpose shows."""


def synth(target: Path, progress: Progress = SILENT, **options: Any) -> Report:
    """Write a synthetic checkpoint, with the options of SynthOptions by name; TARGET appears
    complete or not at all.

    The weights depend on model, layer and seed alone: not on format, shards, workers or `layers`.
    """
    conversion = plan_synth(target, **options)
    seed = SynthOptions(**options).seed
    return run(conversion, progress, SyntheticBytes(conversion.source.config, seed))


def plan_synth(target: Path, **options: Any) -> Conversion:
    """All that `synth` will write, decided; raises UsageError that lists the choices.

    `auto` shards a whole released model as it was published, anything else by size.
    """
    wanted = SynthOptions(**options)
    dtype, shards = wanted.dtype, wanted.shards
    require_words(wanted, "dtype", "shards")
    # The source lies in no directory, so there is none that TARGET could damage.
    target = check_target(Path(os.devnull), target)
    kind = FORMATS[wanted.format]
    source = virtual_checkpoint(wanted.model, wanted.layers, wanted.seed)
    whole = source.config in (MODELS["20b"], MODELS["120b"])
    if shards == "auto":
        shards = "published" if whole and dtype != "bf16" and kind.published else "size"
    # A sidecar would claim that the BF16 weights came from files that never were.
    conversion = plan_opened(
        source,
        target,
        Options(
            wanted.format,
            dtype,
            shards,
            keep_scales=False,
            workers=wanted.workers,
            overwrite=wanted.overwrite,
        ),
    )
    image = conversion.image
    if kind.side is not None:
        side = _side_files(kind.side, source.config, wanted.model, wanted.seed)
        image = replace(image, closing=(*side, *image.closing))
    # The notes of a conversion tell of the tokenizer that a source lacks.
    return replace(conversion, image=image, notes=())


def virtual_checkpoint(model: str, layers: int | None = None, seed: int = 0) -> Checkpoint:
    """The HF MXFP4 checkpoint of a model as if it were open; each tensor is a file of its own."""
    if model not in MODELS:
        raise UsageError(f"--model {model}: choose {', '.join(MODELS)}")
    config = MODELS[model]
    if layers is not None:
        if not 1 <= layers <= MAX_LAYERS:
            raise UsageError(f"--layers {layers}: choose 1 to {MAX_LAYERS}")
        config = replace(config, num_hidden_layers=layers)
    chunks = tuple(
        Chunk(t.name, t.dtype, t.shape, (0,) * len(t.shape), t.shape, t.name, 0)
        for t in tensors_of(config)
    )
    content = json.loads(configs.hf_json(config, None, mxfp4=True))
    ids = special_tokens(config)
    content |= {"eos_token_id": ids["<|return|>"], "pad_token_id": ids["<|endoftext|>"]}
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    # The name says which bytes these are: an interrupted run of another seed must not go on.
    root = Path(f"synthetic-{model}-seed-{seed}")
    return Checkpoint(hf.FORMAT, "mxfp4", root, config, text, chunks, {})


_SPECIAL = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
_TEMPLATE = """\
{%- for message in messages -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|end|>
{%- endfor -%}
{%- if add_generation_prompt %}<|start|>assistant{% endif -%}
"""
_README = """\
# Synthetic checkpoint ({model}, {layers} layers, seed {seed})

Made by `gptoss-convert synth` for tests: random weights under the names, shapes and dtypes of
GPT-OSS, and a tokenizer of single bytes. It answers nothing sensible and is no OpenAI model.
"""


def special_tokens(config: Config) -> dict[str, int]:
    """The special tokens at their released ids, or behind the 256 bytes of a small vocabulary."""
    if config.vocab_size > max(_SPECIAL.values()):
        return _SPECIAL
    return {token: 256 + i for i, token in enumerate(_SPECIAL)}


def _side_files(folder: str, config: Config, model: str, seed: int) -> list[tuple[str, bytes]]:
    """What a directory needs beside the weights to be loaded and prompted."""
    ids = special_tokens(config)
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|return|>",
        "pad_token": "<|endoftext|>",
    }
    generation = {
        "bos_token_id": ids["<|startoftext|>"],
        "do_sample": True,
        "eos_token_id": [ids["<|return|>"], ids["<|endoftext|>"], ids["<|call|>"]],
        "pad_token_id": ids["<|endoftext|>"],
        "transformers_version": "4.55.0.dev0",
    }
    tokenizer = {
        **names,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    readme = _README.format(model=model, layers=config.num_hidden_layers, seed=seed)
    files = {
        "README.md": readme.encode(),
        "chat_template.jinja": _TEMPLATE.encode(),
        "generation_config.json": _json(generation),
        "special_tokens_map.json": _json(names),
        "tokenizer.json": _json(_tokenizer(ids)),
        "tokenizer_config.json": _json(tokenizer),
    }
    return [(folder + name, content) for name, content in files.items()]


def _tokenizer(ids: Mapping[str, int]) -> dict[str, Any]:
    """A byte-level BPE without merges, as the `tokenizers` library reads it."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": token, **flags, "special": True} for token, i in ids.items()
        ],
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": False},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": False},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {**_byte_tokens(), **ids},
            "merges": [],
        },
    }


def _byte_tokens() -> dict[str, int]:
    """The printable character that byte-level BPE has for each byte (GPT-2)."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    shown = {byte: chr(byte) for byte in plain}
    shown |= {byte: chr(256 + i) for i, byte in enumerate(others)}
    return {shown[byte]: byte for byte in range(256)}


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

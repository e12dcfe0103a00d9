"""The numbers of a model as OpenAI and Megatron write them; hf_config.py has Hugging Face's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.containers.paths import read_text
from gptoss_convert.errors import InputError
from gptoss_convert.witness.model import ModelConfig

_MOST = 1 << 22
QUICK_GELU_ALPHA = 1.702
"""Written into OpenAI's and Megatron's code, and implied by configs that lack `swiglu_alpha`."""
OPENAI_NORM_EPS = 1e-05
"""Written into OpenAI's RMSNorm; its config.json has no key for it."""


class Section:
    """A JSON or YAML object whose keys are required, typed, and named in errors."""

    def __init__(self, content: Mapping[str, Any], where: str):
        self.content = content
        self.where = where

    def value(self, key: str) -> Any:
        """The value of `key`; InputError if the key is missing."""
        if key not in self.content:
            raise InputError(f"{self.where}: expects key {key!r}, found none")
        return self.content[key]

    def integer(self, key: str) -> int:
        """The value of `key` as a whole number."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value != int(value):
            raise InputError(f"{self.where}: {key} expects a whole number, found {value!r}")
        return int(value)

    def number(self, key: str) -> float:
        """The value of `key` as a float."""
        value = self.value(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.where}: {key} expects a number, found {value!r}")
        return float(value)

    def section(self, key: str) -> Section:
        """The object under `key`."""
        value = self.value(key)
        if not isinstance(value, Mapping):
            raise InputError(f"{self.where}: {key} expects an object, found {value!r}")
        return Section(value, f"{self.where}: {key}")

    def require(self, key: str, expected: object) -> None:
        """Raise InputError unless `key` has the one value that GPT-OSS has."""
        found = self.value(key)
        if found != expected:
            raise InputError(f"{self.where}: {key} expects {expected!r}, found {found!r}")


def read_json(path: Path) -> Section:
    """The object in a JSON file; InputError if there is none."""
    try:
        content = json.loads(read_text(path.parent, path.name, _MOST))
    except ValueError as error:
        raise InputError(f"{path}: expects a JSON object, found {error}") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: expects a JSON object, found {type(content).__name__}")
    return Section(content, str(path))


def openai_config(config: Section) -> ModelConfig:
    """The numbers of an OpenAI config.json; what it leaves out stands in OpenAI's code."""
    return ModelConfig(
        hidden=config.integer("hidden_size"),
        inter=config.integer("intermediate_size"),
        heads=config.integer("num_attention_heads"),
        kv_heads=config.integer("num_key_value_heads"),
        head_dim=config.integer("head_dim"),
        experts=config.integer("num_experts"),
        experts_per_token=config.integer("experts_per_token"),
        vocab=config.integer("vocab_size"),
        sliding=tuple(n % 2 == 0 for n in range(config.integer("num_hidden_layers"))),
        window=config.integer("sliding_window"),
        rope_theta=config.number("rope_theta"),
        rope_factor=config.number("rope_scaling_factor"),
        rope_original_length=config.integer("initial_context_length"),
        rope_beta_fast=config.number("rope_ntk_beta"),
        rope_beta_slow=config.number("rope_ntk_alpha"),
        rope_truncate=False,
        swiglu_alpha=QUICK_GELU_ALPHA,
        swiglu_limit=config.number("swiglu_limit"),
        norm_eps=OPENAI_NORM_EPS,
    )


MEGATRON_FIXED: Mapping[str, object] = {
    "softmax_type": "learnable",
    "glu_linear_offset": 1.0,
    "normalization": "RMSNorm",
    "add_bias_linear": True,
    "moe_router_pre_softmax": False,
    "moe_router_score_function": "softmax",
    "position_embedding_type": "yarn",
}
"""Options of Megatron's model that GPT-OSS leaves no choice about."""

_MEGATRON_NUMBERS = {
    "rope_theta": ("rotary_base",),
    "rope_factor": ("yarn_rotary_scaling_factor",),
    "rope_original_length": ("yarn_original_max_position_embeddings",),
    "rope_beta_fast": ("yarn_beta_fast",),
    "rope_beta_slow": ("yarn_beta_slow",),
    "swiglu_limit": ("activation_func_clamp_value",),
    "norm_eps": ("layernorm_epsilon", "norm_epsilon"),
    "experts_per_token": ("moe_router_topk",),
}
"""Each number of the arithmetic, and what TransformerConfig or the arguments call it."""


def megatron_config(words: Section, base: ModelConfig) -> ModelConfig:
    """A model of the sizes of `base`, its arithmetic as Megatron's own words have it.

    They are Megatron-LM's arguments or Megatron-Bridge's `model` section; what they leave out, or
    have as None, stays that of `base`. Raises InputError for what no GPT-OSS has.
    """
    for key, expected in MEGATRON_FIXED.items():
        if key in words.content:
            words.require(key, expected)
    said = {key: value for key, value in words.content.items() if value is not None}
    if "yarn_beta_fast" in words.content and "yarn_rotary_scaling_factor" not in said:
        # Megatron-LM's argument for YaRN's factor, from core 0.19 on.
        said["yarn_rotary_scaling_factor"] = said.get("rotary_scaling_factor", 1.0)
    stated = Section(said, words.where)
    changes: dict[str, Any] = {}
    for number, names in _MEGATRON_NUMBERS.items():
        for name in names:
            if name in said:
                changes[number] = type(getattr(base, number))(stated.number(name))
    if "yarn_correction_range_round_to_int" in said:
        changes["rope_truncate"] = bool(said["yarn_correction_range_round_to_int"])
    if "window_size" in said:
        behind, ahead = said["window_size"]
        if ahead != 0:
            raise InputError(f"{words.where}: window_size expects 0 keys ahead, found {ahead!r}")
        changes["window"] = behind + 1
        changes["sliding"] = _megatron_sliding(stated, len(base.sliding))
    return replace(base, **changes)


def _megatron_sliding(words: Section, layers: int) -> tuple[bool, ...]:
    """Layers count from 1; every `skip`-th attends to all, or a list says 1 for a window."""
    skip = words.content.get("window_attn_skip_freq")
    if isinstance(skip, list) and len(skip) == layers:
        return tuple(bool(windowed) for windowed in skip)
    if skip is None:
        return (True,) * layers
    every = words.integer("window_attn_skip_freq")
    return tuple(number % every != 0 for number in range(1, layers + 1))

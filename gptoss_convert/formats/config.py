"""The numbers that define a GPT-OSS model, from and to each ecosystem's config.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gptoss_convert.errors import InputError

MXFP4_CONFIG = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
"""quantization_config as released: present exactly where the experts are MXFP4."""

_ARCHITECTURES = ["GptOssForCausalLM"]
_RELEASED: dict[str, Any] = {
    "architectures": _ARCHITECTURES,
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": 200002,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "gpt_oss",
    "output_router_logits": False,
    "pad_token_id": 199999,
    "rms_norm_eps": 1e-05,
    "router_aux_loss_coef": 0.9,
    "tie_word_embeddings": False,
    "transformers_version": "4.55.0.dev0",
    "use_cache": True,
}
"""Keys of the released config.json that no number of the model decides."""

_SIZES = {20: (24, 32), 120: (36, 128)}
_FIXED = {"attention_bias": True, "tie_word_embeddings": False, "hidden_act": "silu"}
_FIXED |= {"swiglu_alpha": 1.702}
"""Keys that may be absent, and the only value of each that GPT-OSS can have."""
_TWINS = {
    "experts_per_token": "num_experts_per_tok",
    "initial_context_length": "original_max_position_embeddings",
}
"""Older keys beside the ones that are read: both must say the same."""
_LARGEST = {"num_hidden_layers": 1 << 10, "num_local_experts": 1 << 12, "num_experts": 1 << 12}
"""Limits of what is counted out, so that no number makes a plan of endless length."""


@dataclass(frozen=True)
class Config:
    """The model's numbers, under the names of Hugging Face's config.json."""

    num_hidden_layers: int
    num_local_experts: int
    num_experts_per_tok: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    sliding_window: int
    max_position_embeddings: int
    original_max_position_embeddings: int
    swiglu_limit: float
    rms_norm_eps: float
    rope_theta: float
    rope_factor: float
    beta_fast: float
    beta_slow: float
    notes: tuple[str, ...] = ()
    """Defaults that were filled in because the source leaves them out."""

    @property
    def numbers(self) -> dict[str, int]:
        """The whole numbers, by key: what the axes of the hub are computed from."""
        return {k: v for k, v in vars(self).items() if type(v) is int}

    @property
    def size(self) -> str:
        """`20b`, `120b`, or a description of another size."""
        shape = (self.num_hidden_layers, self.num_local_experts)
        for name, released in _SIZES.items():
            if shape == released and self.hidden_size == 2880:
                return f"{name}b"
        return f"{shape[0]} layers, {shape[1]} experts, hidden {self.hidden_size}"


def from_hf(where: str, content: Mapping[str, Any]) -> Config:
    """Read Hugging Face's config.json; raises InputError naming the key, found and expected."""
    if content.get("model_type") != "gpt_oss":
        found = content.get("model_type", content.get("architectures"))
        raise InputError(f"{where}: model_type {found!r}; supported: 'gpt_oss'")
    quantization = content.get("quantization_config")
    if not isinstance(quantization, dict | None):
        raise InputError(f"{where}: quantization_config is {quantization!r:.80}, expects an object")
    if quantization is not None and quantization.get("quant_method") != "mxfp4":
        method = quantization.get("quant_method")
        raise InputError(f"{where}: quantised with {method!r}; supported: 'mxfp4' or none")
    rope = _rope(where, content)
    notes = _check_rope(where, rope) + _check_layers(where, content)
    if (named := content.get("architectures", _ARCHITECTURES)) != _ARCHITECTURES:
        notes += (f"architectures is {named!r:.80}: read as {_ARCHITECTURES[0]}",)
    _check_fixed(where, content, rope)
    limit = 7.0
    if "swiglu_limit" in content:
        limit = float(_number(where, content, "swiglu_limit", float))
    else:
        notes += ("swiglu_limit is missing: taken as 7.0, as released",)
    numbers = {key: _number(where, content, key, int) for key in _INTEGERS}
    return Config(
        **numbers,
        max_position_embeddings=_number(where, content, "max_position_embeddings", int),
        original_max_position_embeddings=_number(
            where, rope, "original_max_position_embeddings", int
        ),
        swiglu_limit=limit,
        rms_norm_eps=float(_number(where, content, "rms_norm_eps", float)),
        rope_theta=float(_number(where, rope, "rope_theta", float)),
        rope_factor=float(_number(where, rope, "factor", float)),
        beta_fast=float(_number(where, rope, "beta_fast", float)),
        beta_slow=float(_number(where, rope, "beta_slow", float)),
        notes=notes,
    )


_POSITIONS = {"max_position_embeddings", "original_max_position_embeddings"}
_INTEGERS = tuple(f.name for f in fields(Config) if f.type == "int" and f.name not in _POSITIONS)
"""The numbers that every config.json states under one key of its own."""


def _rope(where: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The rope numbers under one roof, from `rope_parameters` or `rope_scaling` + `rope_theta`."""
    new, old = content.get("rope_parameters"), content.get("rope_scaling")
    if not isinstance(new, dict | None) or not isinstance(old, dict | None):
        raise InputError(f"{where}: rope_parameters and rope_scaling must be objects")
    rope = dict(old or {})
    if "rope_theta" in content:
        rope["rope_theta"] = content["rope_theta"]
    for key, value in (new or {}).items():
        if key in rope and rope[key] != value:
            raise InputError(
                f"{where}: rope_parameters.{key} is {value!r}, rope_scaling has {rope[key]!r}"
            )
        rope[key] = value
    return rope


def _check_fixed(where: str, content: Mapping[str, Any], rope: Mapping[str, Any]) -> None:
    """Refuse what no GPT-OSS says, and older keys that contradict the newer ones."""
    for key, value in _FIXED.items():
        if content.get(key, value) != value:
            raise InputError(f"{where}: {key} is {content[key]!r}, GPT-OSS has {value!r}")
    for old, key in _TWINS.items():
        value = rope[key] if key in rope else content.get(key)
        if content.get(old, value) != value:
            raise InputError(f"{where}: {old} is {content[old]!r}, {key} is {value!r}")


def _check_rope(where: str, rope: Mapping[str, Any]) -> tuple[str, ...]:
    kind = rope.get("rope_type", rope.get("type"))
    if kind != "yarn":
        raise InputError(f"{where}: rope_type is {kind!r}, GPT-OSS has 'yarn'")
    if rope.get("truncate", False) is not False:
        raise InputError(f"{where}: rope truncate is {rope['truncate']!r}, GPT-OSS has False")
    return () if "truncate" in rope else ("rope truncate is missing: taken as false, as released",)


def _check_layers(where: str, content: Mapping[str, Any]) -> tuple[str, ...]:
    expected = layer_types(_number(where, content, "num_hidden_layers", int))
    if "layer_types" not in content:
        return ("layer_types is missing: taken as alternating, sliding first, as released",)
    if content["layer_types"] != expected:
        raise InputError(
            f"{where}: layer_types do not alternate sliding_attention, full_attention over "
            f"{len(expected)} layers"
        )
    return ()


def layer_types(layers: int) -> list[str]:
    """Sliding window on even layers (counted from 0), full attention on odd ones."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]


def _number(where: str, content: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in content:
        raise InputError(f"{where}: no {key!r}")
    value = content[key]
    if type(value) is not int and (kind is int or type(value) is not float):
        raise InputError(
            f"{where}: {key} is {value!r}, expects {'a whole' if kind is int else 'a'} number"
        )
    limit = _LARGEST.get(key, 1 << 40)
    if not 0 < value <= limit:
        raise InputError(f"{where}: {key} is {value!r}, expects more than 0 and at most {limit}")
    return value


def from_openai(where: str, content: Mapping[str, Any]) -> Config:
    """Read the config.json of OpenAI's `original/`: exactly its 16 keys."""
    expected = set(_OPENAI_KEYS)
    if lacking := expected - set(content):
        raise InputError(f"{where}: no {min(lacking)!r}")
    if extra := set(content) - expected:
        raise InputError(
            f"{where}: unknown key {min(extra)!r}; OpenAI's ModelConfig has no such field"
        )
    for key in _OPENAI_KEYS:
        _number(where, content, key, float)
    factor = float(content["rope_scaling_factor"])
    numbers = {
        name: _number(where, content, key, int)
        for key, name in _OPENAI_KEYS.items()
        if name in _INTEGERS
    }
    initial = _number(where, content, "initial_context_length", int)
    return Config(
        **numbers,
        max_position_embeddings=int(initial * factor),
        original_max_position_embeddings=initial,
        swiglu_limit=float(content["swiglu_limit"]),
        rms_norm_eps=1e-05,
        rope_theta=float(content["rope_theta"]),
        rope_factor=factor,
        beta_fast=float(content["rope_ntk_beta"]),
        beta_slow=float(content["rope_ntk_alpha"]),
    )


_OPENAI_KEYS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "original_max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
}
"""The keys of OpenAI's config.json in their order, and the name of the same number here."""

_OPENAI_FLOATS = frozenset(("swiglu_limit", "rope_scaling_factor"))


def openai_json(config: Config) -> bytes:
    """OpenAI's config.json: one line, the 16 keys in the released order and number form."""
    if config.rms_norm_eps != 1e-05:
        raise InputError(
            f"config: rms_norm_eps is {config.rms_norm_eps}, OpenAI's layout cannot say it (1e-05)"
        )
    content = {}
    for key, name in _OPENAI_KEYS.items():
        value = getattr(config, name)
        whole = key not in _OPENAI_FLOATS and float(value).is_integer()
        content[key] = int(value) if whole else float(value)
    return json.dumps(content).encode()


def hf_json(config: Config, base: Mapping[str, Any] | None, mxfp4: bool) -> bytes:
    """Hugging Face's config.json: the released keys, those of `base`, both forms of rope."""
    content = dict(base) if base is not None else dict(_RELEASED)
    rope = {
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "rope_type": "yarn",
        "truncate": False,
    }
    theta = int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta
    numbers = {key: getattr(config, key) for key in _INTEGERS}
    content |= {
        **numbers,
        "experts_per_token": config.num_experts_per_tok,
        "initial_context_length": config.original_max_position_embeddings,
        "layer_types": layer_types(config.num_hidden_layers),
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {**rope, "rope_theta": theta},
        "rope_scaling": rope,
        "rope_theta": theta,
        "swiglu_limit": config.swiglu_limit,
    }
    content.pop("quantization_config", None)
    if mxfp4:
        content["quantization_config"] = MXFP4_CONFIG
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()

"""Hugging Face's config.json written: every key of it is true of TARGET."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gptoss_convert.formats.config.keys import KEYS, Use
from gptoss_convert.formats.config.numbers import Config, layer_types
from gptoss_convert.formats.config.rope import SECTIONS

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
_FLOATS = frozenset(("initializer_range", "router_aux_loss_coef"))
"""Keys whose whole numbers transformers refuses: written as the floats that they are."""
_HARMLESS = ("mscale", "mscale_all_dim", "finetuned")
"""Keys of a rope section that attention_factor covers, or that nobody reads."""
_ROPE = {"rope_theta", "rope_factor", "rope_truncate", "beta_fast", "beta_slow"}
_NOT_PLAIN = {*_ROPE, "attention_factor", "original_max_position_embeddings", "notes"}
_PLAIN = tuple(one.name for one in fields(Config) if one.name not in _NOT_PLAIN)
"""The numbers that stand in config.json under their own names."""


def hf_json(config: Config, base: Mapping[str, Any] | None, mxfp4: bool) -> bytes:
    """Hugging Face's config.json: the released keys, those of `base` that are true of TARGET, both
    forms of rope."""
    content, _ = _true(config, _RELEASED if base is None else base)
    rope = {
        "beta_fast": config.beta_fast,
        "beta_slow": config.beta_slow,
        "factor": config.rope_factor,
        "original_max_position_embeddings": config.original_max_position_embeddings,
        "rope_type": "yarn",
        "truncate": config.rope_truncate,
    }
    if config.attention_factor is not None:
        rope["attention_factor"] = config.attention_factor
    for section in SECTIONS:
        stated = (base or {}).get(section) or {}
        rope |= {key: stated[key] for key in _HARMLESS if key in stated}
    theta = int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta
    content |= {
        **{key: getattr(config, key) for key in _PLAIN},
        "experts_per_token": config.num_experts_per_tok,
        "initial_context_length": config.original_max_position_embeddings,
        "layer_types": layer_types(config.num_hidden_layers),
        "rope_parameters": {**rope, "rope_theta": theta},
        "rope_scaling": rope,
        "rope_theta": theta,
    }
    content.pop("quantization_config", None)
    if mxfp4:
        content["quantization_config"] = MXFP4_CONFIG
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()


def hf_text(config: Config, text: str | None) -> bytes:
    """The config.json that a format carries for the way back: `text`, or what is true of it."""
    if text is None:
        return hf_json(config, None, mxfp4=False)
    content, notes = _true(config, json.loads(text))
    return (json.dumps(content, indent=2) + "\n").encode() if notes else text.encode()


def corrections(config: Config, base: Mapping[str, Any]) -> list[str]:
    """What `base` says that is not true of TARGET, or that transformers would not load, by key."""
    return _true(config, base)[1]


def _true(config: Config, base: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The keys of `base` that are true of TARGET, and in words those that are not."""
    content: dict[str, Any] = {}
    notes: list[str] = []
    for name, value in base.items():
        key = KEYS.get(name)
        kept = value if key is None else _kept(name, value, config)
        if kept is not _NONE:
            content[name] = kept
        # Another class than GPT-OSS's own is noted where it is read.
        if name != "architectures" and (kept is _NONE or kept != value):
            why = f": {key.why}" if key and key.why else ""
            becomes = "left out of TARGET" if kept is _NONE else f"{kept!r:.80} in TARGET"
            notes.append(f"config.json: {name} is {value!r:.80}, {becomes}{why}")
    content.setdefault("architectures", _ARCHITECTURES)
    return content, notes


_NONE = object()


def _kept(name: str, value: Any, config: Config) -> Any:
    """What TARGET says under a key of the table, `_NONE` if nothing."""
    key = KEYS[name]
    if key.use is Use.FIXED:
        return key.value
    if key.use is Use.LEFT:
        return _NONE
    if key.use is Use.TOKEN:
        return _tokens(value, config.vocab_size, several=name == "eos_token_id")
    if key.use is Use.CARRIED:
        if not key.accepts(value):
            return _NONE
        return float(value) if name in _FLOATS else value
    if name == "architectures":
        return _ARCHITECTURES
    if name in {"dtype", "torch_dtype"}:
        return None if value is None else "bfloat16"
    return value


def _tokens(value: Any, vocabulary: int, several: bool) -> Any:
    """The ids of a token key that the vocabulary has."""

    def known(token: Any) -> bool:
        return type(token) is int and 0 <= token < vocabulary

    if several and isinstance(value, list):
        kept = [token for token in value if known(token)]
        return kept or _NONE
    return value if value is None or known(value) else _NONE

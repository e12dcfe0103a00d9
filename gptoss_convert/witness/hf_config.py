"""The numbers of Hugging Face's config.json as transformers' GptOssConfig and its YaRN take them.

It accepts what `formats/config` accepts and shares no line with it: by test, both ways.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from gptoss_convert.errors import InputError
from gptoss_convert.witness.configs import QUICK_GELU_ALPHA, Section
from gptoss_convert.witness.model import ModelConfig

_DEFAULTS: dict[str, Any] = {
    "num_hidden_layers": 36,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
    "sliding_window": 128,
    "max_position_embeddings": 131072,
    "swiglu_limit": 7.0,
    "rms_norm_eps": 1e-05,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "hidden_act": "silu",
    "swiglu_alpha": QUICK_GELU_ALPHA,
}
"""GptOssConfig's own, but for rope."""
_YARN: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
"""GptOssConfig's rope_parameters where a config.json has none."""
_YARN_KEYS = {
    *("rope_type", "type", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow"),
    *("truncate", "rope_theta", "attention_factor", "mscale", "mscale_all_dim", "finetuned"),
}
_ONE = {"partial_rotary_factor": 1, "attn_factor": 1, "extrapolation_factor": 1}
_ONE |= {"apply_yarn_scaling": True}
"""Keys of a section that must be absent or say nothing."""
_ELSEWHERE: dict[str, Any] = {"per_layer_config": {}, "is_encoder_decoder": False}
_ELSEWHERE |= {"pruned_heads": {}, "is_causal": True}
_ELSEWHERE |= dict.fromkeys(
    (
        *("text_config", "vision_config", "audio_config", "decoder", "encoder", "generator"),
        "transformers_weights",
    )
)
"""Keys that make another model of it, and the value besides null that does not."""


def hf_config(config: Section) -> ModelConfig:
    """The numbers of an HF config.json, of transformers 4 (`rope_scaling`) or 5."""
    config.require("model_type", "gpt_oss")
    content = {**_DEFAULTS, **config.content}
    if "num_local_experts" not in config.content and "num_experts" in content:
        content["num_local_experts"] = content["num_experts"]
    full = Section(content, config.where)
    for key in ("attention_bias", "tie_word_embeddings", "hidden_act", "swiglu_alpha"):
        full.require(key, _DEFAULTS[key])
    for key, harmless in _ELSEWHERE.items():
        found = content.get(key)
        if found is not None and (found != harmless or type(found) is not type(harmless)):
            raise InputError(f"{config.where}: {key} expects {harmless!r}, found {found!r:.80}")
    _one(full, "partial_rotary_factor", 1)
    rope = _rope(full)
    _same(full, "num_experts", content["num_local_experts"])
    _same(full, "experts_per_token", content["num_experts_per_tok"])
    for key in ("initial_context_length", "original_max_position_embeddings"):
        _same(full, key, rope["original"])
    return _possible(
        config.where,
        ModelConfig(
            hidden=_whole(full, "hidden_size"),
            inter=_whole(full, "intermediate_size"),
            heads=_whole(full, "num_attention_heads"),
            kv_heads=_whole(full, "num_key_value_heads"),
            head_dim=_whole(full, "head_dim"),
            experts=_whole(full, "num_local_experts", 1 << 12),
            experts_per_token=_whole(full, "num_experts_per_tok"),
            vocab=_whole(full, "vocab_size"),
            sliding=_sliding(full),
            window=_whole(full, "sliding_window"),
            rope_theta=rope["theta"],
            rope_factor=rope["factor"],
            rope_original_length=rope["original"],
            rope_beta_fast=rope["fast"],
            rope_beta_slow=rope["slow"],
            rope_truncate=rope["truncate"],
            rope_concentration=rope["concentration"],
            swiglu_alpha=QUICK_GELU_ALPHA,
            swiglu_limit=_positive(full, "swiglu_limit"),
            norm_eps=_positive(full, "rms_norm_eps"),
        ),
    )


def _possible(where: str, model: ModelConfig) -> ModelConfig:
    wrong = (
        model.experts_per_token > model.experts
        or model.heads % model.kv_heads != 0
        or model.head_dim % 2 != 0
        or model.rope_theta <= 1
        or model.rope_factor < 1
    )
    if wrong:
        raise InputError(f"{where}: expects numbers of a model that can be computed, found {model}")
    return model


def _rope(config: Section) -> dict[str, Any]:
    """Theta, factor and the rest, of whichever sections there are; they must agree."""
    found: list[Mapping[str, Any]] = []
    for key in ("rope_scaling", "rope_parameters"):
        section = config.content.get(key)
        if not isinstance(section, Mapping | None):
            raise InputError(f"{config.where}: {key} expects an object, found {section!r:.80}")
        # `rope_scaling or rope_parameters`, then the default where that is None.
        if section or (section is not None and key == "rope_parameters"):
            found.append(section)
    read = [_yarn(config, Section(one, config.where)) for one in found or [_YARN]]
    if read[0] != read[-1]:
        raise InputError(
            f"{config.where}: expects rope_parameters to repeat rope_scaling, found {read[1]!r} "
            f"beside {read[0]!r}"
        )
    return read[0]


def _yarn(config: Section, section: Section) -> dict[str, Any]:
    content = section.content
    for key in ("rope_type", "type"):
        if key in content or (key == "rope_type" and "type" not in content):
            section.require(key, "yarn")
    for key, value in content.items():
        if key in _ONE:
            _one(section, key, _ONE[key])
        elif key not in _YARN_KEYS and value is not None:
            raise InputError(f"{section.where}: expects keys of YaRN, found {key}")
    longest = _whole(config, "max_position_embeddings")
    stated = {key: value for key, value in content.items() if value is not None}
    theta = config.content.get("rope_theta", 150000.0)
    if config.content.get("rope_theta") is not None:
        _same(config, "rope_theta", stated.get("rope_theta", theta))
    defaults = {"beta_fast": 32.0, "beta_slow": 1.0, "rope_theta": theta}
    defaults["original_max_position_embeddings"] = content.get(
        "original_max_position_embeddings", longest
    )
    full = Section({**defaults, **stated}, section.where)
    original = _whole(full, "original_max_position_embeddings")
    absent = "factor" in content and content["factor"] is None
    factor = longest / original if absent else _positive(full, "factor")
    truncate = content.get("truncate", True)
    if not isinstance(truncate, bool | None):
        raise InputError(f"{section.where}: truncate expects true or false, found {truncate!r:.80}")
    return {
        "theta": _positive(full, "rope_theta"),
        "factor": factor,
        "original": original,
        "fast": _positive(full, "beta_fast"),
        "slow": _positive(full, "beta_slow"),
        "truncate": bool(truncate),
        "concentration": _concentration(full, factor),
    }


def _concentration(section: Section, factor: float) -> float | None:
    """`attention_factor`, or what mscale and mscale_all_dim make of it; None is YaRN's own."""

    def scale(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if "attention_factor" in section.content:
        found = _positive(section, "attention_factor")
    elif {"mscale", "mscale_all_dim"} <= section.content.keys():
        found = scale(_positive(section, "mscale")) / scale(_positive(section, "mscale_all_dim"))
    else:
        return None
    return None if found == scale(1.0) else found


def _sliding(config: Section) -> tuple[bool, ...]:
    layers = _whole(config, "num_hidden_layers", 1 << 10)
    alternating = tuple(layer % 2 == 0 for layer in range(layers))
    names = ["sliding_attention" if sliding else "full_attention" for sliding in alternating]
    if config.content.get("layer_types") not in (None, names):
        found = config.content["layer_types"]
        raise InputError(
            f"{config.where}: layer_types expects {layers}, sliding and full by turns, "
            f"found {found!r:.80}"
        )
    return alternating


def _same(config: Section, key: str, expected: object) -> None:
    if config.content.get(key, expected) != expected:
        found = config.content[key]
        raise InputError(f"{config.where}: {key} expects {expected!r:.80}, found {found!r:.80}")


def _one(config: Section, key: str, one: object) -> None:
    found = config.content.get(key)
    if found is not None and (found != one or isinstance(found, bool) != isinstance(one, bool)):
        raise InputError(f"{config.where}: {key} expects {one!r}, found {found!r:.80}")


def _whole(config: Section, key: str, most: int = 1 << 40) -> int:
    value = config.value(key)
    if type(value) is not int or not 0 < value <= most:
        raise InputError(
            f"{config.where}: {key} expects a whole number from 1 to {most}, found {value!r:.80}"
        )
    return value


def _positive(config: Section, key: str) -> float:
    value = config.value(key)
    if type(value) not in {int, float} or not 0 < value <= 1 << 40:
        raise InputError(
            f"{config.where}: {key} expects a number above 0 and below {1 << 40}, "
            f"found {value!r:.80}"
        )
    return float(value)

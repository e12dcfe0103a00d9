"""Hugging Face's config.json read: the one judgement of what is a GPT-OSS that can be converted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from gptoss_convert.errors import InputError
from gptoss_convert.formats.config import rope
from gptoss_convert.formats.config.keys import KEYS, Use, neutral
from gptoss_convert.formats.config.numbers import Config, layer_types, made, number

_ARCHITECTURES = ["GptOssForCausalLM"]
_KINDS = {one.name: float if one.type == "float" else int for one in fields(Config)}


def from_hf(where: str, content: Mapping[str, Any]) -> Config:
    """Read Hugging Face's config.json; raises InputError naming the key, found and expected.

    A key that is left out has the value that transformers takes; `notes` say so.
    """
    require_gpt_oss(where, content)
    _refuse(where, content)
    numbers, notes = _numbers(where, content)
    found, rope_notes = rope.read(where, content, numbers["max_position_embeddings"])
    notes += rope_notes + _check_layers(where, content, numbers["num_hidden_layers"])
    _check_twins(
        where,
        content,
        {**numbers, "original_max_position_embeddings": found.original_max_position_embeddings},
    )
    if (named := content.get("architectures")) not in (None, _ARCHITECTURES):
        notes += (f"architectures is {named!r:.80}: read as {_ARCHITECTURES[0]}",)
    return made(
        where,
        **numbers,
        original_max_position_embeddings=found.original_max_position_embeddings,
        rope_theta=found.rope_theta,
        rope_factor=found.factor,
        beta_fast=found.beta_fast,
        beta_slow=found.beta_slow,
        rope_truncate=found.truncate,
        attention_factor=found.attention_factor,
        notes=notes,
    )


def require_gpt_oss(where: str, content: Mapping[str, Any]) -> None:
    """Refuse the config.json of another architecture."""
    if content.get("model_type") != "gpt_oss":
        found = content.get("model_type", content.get("architectures"))
        raise InputError(f"{where}: model_type {found!r:.80}; supported: 'gpt_oss'")


def quantization(where: str, content: Mapping[str, Any]) -> str | None:
    """The method that quantization_config names, None where there is none or it is null.

    Raises InputError for one that is no object.
    """
    found = content.get("quantization_config")
    if not isinstance(found, dict | None):
        raise InputError(f"{where}: quantization_config is {found!r:.80}, expects an object")
    return None if found is None else str(found.get("quant_method"))


def _numbers(where: str, content: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The numbers of the READ keys but rope's, and what was filled in."""
    numbers: dict[str, Any] = {}
    notes: list[str] = []
    for name, key in KEYS.items():
        if key.use is not Use.READ or name == "rope_theta":
            continue
        twin = "num_experts" if name == "num_local_experts" else name
        stated = name if name in content else twin
        if stated in content:
            value = number(where, content, stated, _KINDS[name])
        else:
            value = key.value
            notes.append(f"{name} is missing: taken as {value}, as transformers does")
        numbers[name] = float(value) if _KINDS[name] is float else value
    return numbers, tuple(notes)


def _refuse(where: str, content: Mapping[str, Any]) -> None:
    """Refuse the values that no GPT-OSS has, and those that nothing here could say of TARGET."""
    for name, key in KEYS.items():
        if name not in content:
            continue
        value = content[name]
        if key.use is Use.FIXED and value != key.value:
            raise InputError(f"{where}: {name} is {value!r:.80}, GPT-OSS has {key.value!r}")
        if key.use is Use.REFUSED and not neutral(value, key.value):
            raise InputError(f"{where}: {name} is {value!r:.80}: {key.why}")


def _check_twins(where: str, content: Mapping[str, Any], numbers: Mapping[str, Any]) -> None:
    for name, key in KEYS.items():
        if key.use is not Use.TWIN or name not in content:
            continue
        if content[name] != (value := numbers[key.value]):
            raise InputError(f"{where}: {name} is {content[name]!r:.80}, {key.value} is {value!r}")


def _check_layers(where: str, content: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    found = content.get("layer_types")
    if found is None:
        return ("layer_types is missing: taken as alternating, sliding first, as released",)
    if found != layer_types(layers):
        raise InputError(
            f"{where}: layer_types do not alternate sliding_attention, full_attention over "
            f"{layers} layers"
        )
    return ()

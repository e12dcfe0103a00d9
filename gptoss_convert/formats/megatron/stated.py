"""What a Megatron checkpoint states of its model, in the names of `field_table`.

Megatron-LM pickles its arguments, Megatron-Bridge writes its provider as YAML. Each is read here as
by the code that builds a model from it: `core_transformer_config_from_args` and its YaRN part,
`post_training/model_builder.py`, `gpt_oss_bridge.py`, and `TransformerConfig.__post_init__`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from gptoss_convert.formats.megatron.field_table import EXTRA, FIXED, NUMBERS, Dialect

_ORIGINAL = "yarn_original_max_position_embeddings"
_ROUND = "yarn_correction_range_round_to_int"
_YARN_OF_ARGS = {
    "yarn_rotary_scaling_factor": ("rotary_scaling_factor", 1.0),
    "yarn_original_max_position_embeddings": ("yarn_original_max_position_embeddings", 4096),
    "yarn_beta_fast": ("yarn_beta_fast", 32.0),
    "yarn_beta_slow": ("yarn_beta_slow", 1.0),
    "yarn_mscale": ("mscale", 1.0),
    "yarn_mscale_all_dim": ("mscale_all_dim", 0.0),
    "yarn_correction_range_round_to_int": ("yarn_correction_range_round_to_int", True),
}
"""YaRN in Megatron-LM's arguments from core 0.19 on: the argument, and what its None means.

Before, no argument reaches YaRN; rotary_scaling_factor, mscale and mscale_all_dim were, and still
are, also those of multi-latent attention."""

_YARN_OF_GPT_OSS = {
    "yarn_rotary_scaling_factor": 32.0,
    "yarn_original_max_position_embeddings": 131072,
    "yarn_beta_fast": 32.0,
    "yarn_beta_slow": 1.0,
    "yarn_mscale": 1.0,
    "yarn_mscale_all_dim": 0.0,
    "yarn_correction_range_round_to_int": False,
}
"""What --enable-gpt-oss of Megatron-LM's ModelOpt builder puts in place of any argument."""

_YARN_OF_BRIDGE = {**_YARN_OF_GPT_OSS, "yarn_original_max_position_embeddings": 4096}
_YARN_OF_BRIDGE |= {"yarn_mscale": None, "yarn_mscale_all_dim": None}
"""YaRN of every GPT-OSS in Megatron-Bridge before 0.4.0: set on a provider that has no such fields,
so that run_config.yaml lacks them."""


@dataclass(frozen=True)
class Stated:
    """The fields of one file, read as Megatron reads them."""

    where: str
    dialect: Dialect
    fields: Mapping[str, Any]
    """By the names of `field_table`; a field that is absent in the file is absent here."""
    spelt: Mapping[str, str]
    """What the file calls a field, where it has another name or another field decides."""
    raw: Mapping[str, Any]
    """The file's own fields."""

    def shown(self, name: str) -> str:
        """What the file calls a field."""
        return self.spelt.get(name, name)

    def says(self, name: str) -> str:
        """A field and its value, as the file has them, in words."""
        shown = self.shown(name)
        if shown not in self.raw:
            stands = name in self.fields
            return f"{shown} is {self.fields[name]!r}" if stands else f"{shown} is not stated"
        taken = self.fields.get(name)
        meant = f" (for {taken!r})" if self.raw[shown] is None and taken is not None else ""
        return f"{shown} is {self.raw[shown]!r:.200}{meant}"


def of_args(where: str, args: Mapping[str, Any]) -> Stated:
    """Megatron-LM's arguments."""
    stated = _named("args", where, args)
    fields, spelt = {**stated.fields}, {**stated.spelt}
    if args.get("group_query_attention") is False:
        fields["num_query_groups"] = None
    if args.get("enable_gpt_oss") is True:
        fields |= {"position_embedding_type": "yarn", **_YARN_OF_GPT_OSS}
        spelt[_ORIGINAL] = f"{_ORIGINAL} (of enable_gpt_oss)"
    elif any(name.startswith("yarn_") for name in args):
        for name, (argument, default) in _YARN_OF_ARGS.items():
            if argument in args:
                found = args[argument]
                fields[name] = default if found is None else found
                spelt[name] = argument
    return _settled(replace(stated, fields=fields, spelt=spelt))


def of_provider(where: str, model: Mapping[str, Any]) -> Stated:
    """The `model` section of Megatron-Bridge's run_config.yaml, flat or with a part of its own."""
    part = model.get("transformer")
    stated = _named("provider", where, {**model, **part} if isinstance(part, dict) else model)
    return _settled(replace(stated, fields={**_YARN_OF_BRIDGE, **stated.fields}))


def _named(dialect: Dialect, where: str, found: Mapping[str, Any]) -> Stated:
    fields = {name: found[name] for name in EXTRA if name in found}
    spelt: dict[str, str] = {}
    for field in (*NUMBERS, *FIXED):
        if field.only not in (None, dialect):
            continue
        for name in (field.name, *(field.args if dialect == "args" else ())):
            if name in found:
                fields[field.name] = _plain(field.name, found[name])
                spelt[field.name] = name
    return Stated(where, dialect, fields, spelt, found)


def _settled(stated: Stated) -> Stated:
    """The same with what None stands for, and without fields that the model does not read."""
    fields, spelt = {**stated.fields}, {**stated.spelt}
    if fields.get("position_embedding_type", "yarn") != "yarn":
        fields = {name: found for name, found in fields.items() if not name.startswith("yarn_")}
    elif None in (fields.get("yarn_mscale"), fields.get("yarn_mscale_all_dim")):
        # Either alone is not read.
        fields.pop("yarn_mscale", None)
        fields.pop("yarn_mscale_all_dim", None)
    if fields.get(_ROUND, False) is None:
        fields[_ROUND] = False
    hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if fields.get("moe_ffn_hidden_size") is None and "ffn_hidden_size" in fields:
        spelt["moe_ffn_hidden_size"] = "ffn_hidden_size"
        inter = fields["ffn_hidden_size"]
        fields["moe_ffn_hidden_size"] = 4 * hidden if inter is None and hidden else inter
    if fields.get("num_query_groups", 0) is None:
        fields["num_query_groups"] = heads
    if fields.get("kv_channels", 0) is None and type(hidden) is type(heads) is int and heads:
        fields["kv_channels"] = hidden // heads
    return replace(stated, fields=fields, spelt=spelt)


def _plain(name: str, found: Any) -> Any:
    """A value in one form, where Megatron has several that mean the same."""
    if isinstance(found, dict) and isinstance(found.get("_target_"), str):
        return found["_target_"].rpartition(".")[2]
    if isinstance(found, str) and name == "window_size":
        found = [int(p) if p.strip().isdigit() else p for p in found.strip("[]()").split(",")]
    if not isinstance(found, list | tuple):
        return found
    ones = [1 if entry else 0 for entry in found]
    if name == "window_attn_skip_freq" and ones and ones == [1 - n % 2 for n in range(len(found))]:
        # One entry a layer, 1 where the window holds: alternating, window first, is the number 2.
        return 2
    if name == "moe_layer_freq" and all(ones):
        return 1
    if name == "no_rope_freq" and not any(ones):
        return None
    if name == "moe_router_load_balancing_type" and len({*map(str, found)}) == 1:
        return found[0]
    return list(found)

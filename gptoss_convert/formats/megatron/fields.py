"""GPT-OSS in Megatron's words: the fields of `args` and run_config.yaml, read as plain data.

Sources: megatron-core's TransformerConfig, Megatron-LM's arguments, Megatron-Bridge's run_config.
A field that contradicts GPT-OSS is refused with both values: such a model would load and be wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk
from gptoss_convert.containers.paths import read_text
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats.config import Config

RUN_CONFIG = "run_config.yaml"
ITERATION = 1
"""Megatron-LM and Megatron-Bridge refuse iteration 0."""
TRACKER = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"
"""Where a Megatron checkpoint carries config.json, tokenizer and template for the way back."""
PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Fields that say how many ranks shared a tensor, the layers, the experts, and one expert."""
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""The tensors that Megatron pads with rows to a multiple of its tensor-parallel size."""
RELEASED_ROWS = 201088
"""Rows of the released models' vocabulary."""

_MAX_YAML = 1 << 20

_SIZES = {
    "num_hidden_layers": ("num_layers",),
    "num_local_experts": ("num_moe_experts", "num_experts"),
    "num_experts_per_tok": ("moe_router_topk",),
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("moe_ffn_hidden_size", "ffn_hidden_size"),
    "num_attention_heads": ("num_attention_heads",),
    "num_key_value_heads": ("num_query_groups",),
    "head_dim": ("kv_channels",),
}
"""Megatron's names of each size, in TransformerConfig and in Megatron-LM's arguments."""


def without_padding(chunks: Sequence[Chunk], vocab_size: int) -> tuple[tuple[Chunk, ...], int]:
    """The chunks with the vocabulary cut to its real rows, and how many rows were padding."""
    cut: list[Chunk] = []
    padding = 0
    for chunk in chunks:
        if chunk.tensor not in VOCABULARY_KEYS or chunk.shape[0] <= vocab_size:
            cut.append(chunk)
            continue
        padding = chunk.shape[0] - vocab_size
        rows = min(chunk.extent[0], vocab_size - chunk.start[0])
        if rows > 0:
            shape = (vocab_size, *chunk.shape[1:])
            cut.append(replace(chunk, shape=shape, extent=(rows, *chunk.extent[1:])))
    return tuple(cut), padding


def vocabulary(
    where: str, fields: Mapping[str, Any], chunks: Sequence[Chunk], asked: int | None
) -> int:
    """Rows of the vocabulary: as asked, as the fields say, else as stored if that is no padding."""
    stored = max((c.shape[0] for c in chunks if c.tensor in VOCABULARY_KEYS), default=0)
    rows = asked or fields.get("vocab_size")
    if rows is None and stored % 128:
        rows = stored
    if type(rows) is not int or not 0 < rows <= stored:
        unknown = (
            f"no vocabulary size, {stored} rows may hold padding; pass --vocab-size "
            f"(as released: {RELEASED_ROWS})"
        )
        wrong = f"vocab_size {rows!r}, the checkpoint holds {stored} rows"
        raise UsageError(f"{where}: {unknown if rows is None else wrong}")
    return rows


def check_rows(where: str, rows: int, asked: int | None) -> None:
    """Refuse --vocab-size where the configuration says otherwise."""
    if asked not in (None, rows):
        raise UsageError(f"{where}: vocab_size is {rows}, --vocab-size is {asked}; omit it")


def read_run_config(directory: Path) -> dict[str, Any] | None:
    """The `model` section of Megatron-Bridge's run_config.yaml as plain data, None without one."""
    path = directory / RUN_CONFIG
    if not path.exists():
        return None
    from gptoss_convert.containers.plain_yaml import parse_yaml

    content = parse_yaml(str(path), read_text(directory, RUN_CONFIG, _MAX_YAML))
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"{path}: no 'model' section")
    return model


def parallel_layout(fields: Mapping[str, Any]) -> dict[str, int]:
    """The parallel sizes that a checkpoint's fields state; none where they state nothing."""
    sizes = {name: fields.get(name) for name in PARALLEL}
    return {name: size for name, size in sizes.items() if type(size) is int}


def contradictions(where: str, fields: Mapping[str, Any], config: Config) -> str | None:
    """The fields that contradict `config`, found and expected, in one line; None without any."""
    follows = {name for names in _SIZES.values() for name in names}
    wrong = [
        f"{field} is {fields[field]!r}, GPT-OSS here has {expected!r}"
        for field, expected in _expected(config).items()
        if field in fields
        # A size that is None follows from the others, as in Megatron-LM's arguments.
        and not (field in follows and fields[field] is None)
        and not _same(_plain(field, fields[field]), expected)
    ]
    return f"{where}: {'; '.join(wrong)}" if wrong else None


def check_fields(where: str, fields: Mapping[str, Any], config: Config) -> None:
    """Refuse fields that contradict `config`; raises InputError with field, found and expected."""
    if problem := contradictions(where, fields, config):
        raise InputError(
            f"{problem}; if the weights are right and these fields wrong, pass --config CONFIG_JSON"
        )


def from_fields(where: str, fields: Mapping[str, Any], vocab_size: int) -> Config:
    """The configuration that `args` or run_config.yaml describe; raises InputError.

    What not every version of Megatron says (window, YaRN, clamp) is taken as released; check_fields
    refuses fields that say something else.
    """
    numbers: dict[str, Any] = {}
    for name, choices in _SIZES.items():
        values = [fields[choice] for choice in choices if type(fields.get(choice)) is int]
        if not values:
            raise InputError(f"{where}: no {' or '.join(choices)}; pass --config CONFIG_JSON")
        numbers[name] = values[0]
    return Config(
        **numbers,
        vocab_size=vocab_size,
        sliding_window=128,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        swiglu_limit=7.0,
        rms_norm_eps=1e-05,
        rope_theta=150000.0,
        rope_factor=32.0,
        beta_fast=32.0,
        beta_slow=1.0,
        notes=(f"{where}: what it does not say of window, YaRN and clamp is taken as released",),
    )


def _plain(field: str, found: object) -> object:
    """A field's value in the form that GPT-OSS's is stated in, where several mean the same."""
    if isinstance(found, dict) and isinstance(found.get("_target_"), str):
        return found["_target_"]
    if field == "window_attn_skip_freq" and isinstance(found, list | tuple):
        # One entry a layer, 1 where the window holds: alternating, window first, is the number 2.
        alternating = all(bool(entry) == (n % 2 == 0) for n, entry in enumerate(found))
        return 2 if alternating else found
    return found


def _same(found: object, expected: object) -> bool:
    """Equality across the forms that fields take: tuples as lists or text, numbers as floats."""
    if isinstance(expected, list):
        if isinstance(found, str):
            found = [part.strip() for part in found.strip("[]()").split(",")]
        if not isinstance(found, list | tuple):
            return False
        return [str(part) for part in found] == [str(part) for part in expected]
    if isinstance(expected, bool):
        return found is expected
    if isinstance(expected, int | float):
        return isinstance(found, int | float) and float(found) == float(expected)
    # Enumerations come as text that ends with their value.
    return isinstance(found, str) and found.rpartition(".")[2] == expected


def _expected(config: Config) -> dict[str, Any]:
    """Fields whose other values change the model's output, Megatron-LM's other names included."""
    return {
        **model_fields(config),
        "num_moe_experts": config.num_local_experts,
        "gated_linear_unit": True,
        "rotary_scaling_factor": config.rope_factor,
        "layernorm_epsilon": config.rms_norm_eps,
        "norm_epsilon": config.rms_norm_eps,
        "share_embeddings_and_output_weights": False,
        "untie_embeddings_and_output_weights": True,
        "rotary_interleaved": False,
        "rotary_percent": 1.0,
        "activation_func": "quick_gelu",
        "quick_geglu": True,
        "swiglu": False,
        "layernorm_zero_centered_gamma": False,
        "apply_layernorm_1p": False,
    }


def model_fields(config: Config) -> dict[str, Any]:
    """The fields that Megatron-LM's arguments and Megatron-Bridge's provider both have."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "moe_ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "moe_router_topk": config.num_experts_per_tok,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "normalization": "RMSNorm",
        "activation_func_clamp_value": config.swiglu_limit,
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "window_size": [config.sliding_window - 1, 0],
        "window_attn_skip_freq": 2,
        "position_embedding_type": "yarn",
        "rotary_base": int(config.rope_theta),
        "yarn_rotary_scaling_factor": config.rope_factor,
        "yarn_original_max_position_embeddings": config.original_max_position_embeddings,
        "yarn_beta_fast": config.beta_fast,
        "yarn_beta_slow": config.beta_slow,
        "yarn_correction_range_round_to_int": config.rope_truncate,
    }

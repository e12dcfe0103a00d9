"""GPT-OSS in Megatron's words: its numbers taken from fields, and fields held against them.

A field that contradicts GPT-OSS is refused with both values: such a model would load and be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gptoss_convert.containers.torch_dist.common import Opaque
from gptoss_convert.errors import InputError
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.config import numbers as config_numbers
from gptoss_convert.formats.megatron.field_table import FIXED, NUMBERS, UNSTATED, Field
from gptoss_convert.formats.megatron.stated import Stated

PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
"""Fields that say how many ranks shared a tensor, the layers, the experts, and one expert."""


def take(stated: Stated) -> dict[str, Any]:
    """The numbers of `Config` but the vocabulary's, where nothing else tells them.

    An absent field means Megatron's default. The context is what YaRN reaches: no field of its own
    changes the arithmetic. Raises InputError that names whatever is missing or not GPT-OSS.
    """
    numbers: dict[str, Any] = {}
    problems = _problems(stated, FIXED, absent=True)
    missing: list[str] = []
    for field in NUMBERS:
        if stated.fields.get(field.name, field.default) == UNSTATED:
            missing.append(field.name)
            continue
        try:
            numbers[field.number or ""] = _number(stated, field)
        except InputError as error:
            problems.append(str(error))
    _refuse(stated, problems + _mistakes(stated))
    if missing:
        # Only now: another model lacks numbers, those of YaRN say, for good reason.
        words = f"states no {', '.join(missing)}; pass --config CONFIG_JSON"
        raise InputError(f"{stated.where}: {words}")
    experts, chosen = numbers["num_local_experts"], numbers["num_experts_per_tok"]
    if chosen > experts:
        _refuse(stated, [f"{stated.shown('moe_router_topk')} is {chosen}, of {experts} experts"])
    original, factor = numbers["original_max_position_embeddings"], numbers["rope_factor"]
    return {**numbers, "max_position_embeddings": int(original * factor)}


def unusual(config: Config) -> tuple[str, ...]:
    """Numbers that differ from those that all released models share, in words."""
    shared = {field.number or "": field.released for field in NUMBERS if field.released is not None}
    return tuple(
        f"{name} is {found!r}, as stated; all released models have {usual!r}"
        for name, usual in shared.items()
        if (found := getattr(config, name)) != usual
    )


def contradictions(stated: Stated, config: Config) -> str | None:
    """The fields that contradict `config`, found and expected, in one line; None without any."""
    problems = _contradicting(stated, config)
    return f"{stated.where}: {'; '.join(problems)}" if problems else None


def check_fields(stated: Stated, config: Config) -> None:
    """Refuse fields that contradict `config`; raises InputError with field, found and expected."""
    _refuse(stated, _contradicting(stated, config))


def _contradicting(stated: Stated, config: Config) -> list[str]:
    numbers = model_numbers(config)
    expected = [replace(field, allowed=(numbers[field.name],)) for field in NUMBERS]
    return _problems(stated, (*expected, *FIXED), absent=False)


def _refuse(stated: Stated, problems: list[str]) -> None:
    if problems:
        raise InputError(
            f"{stated.where}: {'; '.join(problems)}; if the weights are right and these fields "
            "wrong, pass --config CONFIG_JSON"
        )


def _problems(stated: Stated, expected: Iterable[Field], *, absent: bool) -> list[str]:
    """Fields whose values are not allowed; `absent` ones say Megatron's default, or nothing."""
    result: list[str] = []
    for field in expected:
        if field.only not in (None, stated.dialect):
            continue
        found = stated.fields.get(field.name, field.default if absent else UNSTATED)
        allowed = field.allowed
        if field.name == "softmax_scale" and type(width := stated.fields.get("kv_channels")) is int:
            allowed = (*allowed, width**-0.5)
        if isinstance(found, Opaque):
            result.append(f"{stated.says(field.name)}, an object, expects a plain value")
        elif found != UNSTATED and not any(_same(found, value) for value in allowed):
            default = "" if field.name in stated.fields else f", for Megatron {found!r}"
            says = stated.says(field.name)
            result.append(f"{says}{default}, GPT-OSS here has {allowed[0]!r}")
    return result


def _mistakes(stated: Stated) -> list[str]:
    return [
        f"{stated.says(field.name)}, {field.mistake[1]}"
        for field in NUMBERS
        if field.mistake and _same(stated.fields.get(field.name, UNSTATED), field.mistake[0])
    ]


def _number(stated: Stated, field: Field) -> Any:
    """The number that a field states; raises InputError without a place."""
    assert field.number is not None
    found = stated.fields.get(field.name, field.default)
    if field.number == "rope_truncate" and isinstance(found, bool):
        return found
    kind = config_numbers.kind_of(field.number)
    limit = config_numbers.LARGEST.get(field.number, 1 << 40)
    expected = f"{'a whole' if kind is int else 'a'} number above 0, at most {limit}"
    if field.name == "window_size":
        expected = "[tokens before, 0]"
        found = _tokens(found)
    if isinstance(found, int | float) and type(found) in (int, kind) and 0 < found <= limit:
        return kind(found)
    raise InputError(f"{stated.says(field.name)}, expects {expected}")


def _tokens(window: object) -> int | None:
    """Tokens of a window that looks back only, the token itself included; None for another."""
    match window:
        case [int(behind), 0]:
            return behind + 1
    return None


def _same(found: object, expected: object) -> bool:
    """Equality across the forms that fields take: tuples as lists, numbers as floats."""
    if isinstance(expected, list | tuple):
        return isinstance(found, list | tuple) and [*found] == [*expected]
    if expected is None or isinstance(expected, bool):
        return found is expected
    if isinstance(expected, int | float):
        return type(found) in (int, float) and found == expected
    # Enumerations come as text that ends with their value.
    return isinstance(found, str) and found.rpartition(".")[2] == expected


def model_numbers(config: Config) -> dict[str, Any]:
    """The fields that state the model's numbers, by TransformerConfig's and GPTModel's names."""
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "moe_ffn_hidden_size": config.intermediate_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_key_value_heads,
        "kv_channels": config.head_dim,
        "num_moe_experts": config.num_local_experts,
        "moe_router_topk": config.num_experts_per_tok,
        "layernorm_epsilon": config.rms_norm_eps,
        "activation_func_clamp_value": config.swiglu_limit,
        "window_size": [config.sliding_window - 1, 0],
        "rotary_base": int(config.rope_theta),
        "yarn_rotary_scaling_factor": config.rope_factor,
        "yarn_original_max_position_embeddings": config.original_max_position_embeddings,
        "yarn_beta_fast": config.beta_fast,
        "yarn_beta_slow": config.beta_slow,
        "yarn_correction_range_round_to_int": config.rope_truncate,
    }


def model_fields(config: Config) -> dict[str, Any]:
    """The fields that Megatron-LM's arguments and Megatron-Bridge's provider both have."""
    numbers = model_numbers(config)
    return {
        **{name: numbers[name] for name in _SIZES},
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "normalization": "RMSNorm",
        "activation_func_clamp_value": numbers["activation_func_clamp_value"],
        "glu_linear_offset": 1.0,
        "add_bias_linear": True,
        "softmax_type": "learnable",
        "window_size": numbers["window_size"],
        "window_attn_skip_freq": 2,
        "position_embedding_type": "yarn",
        "rotary_base": numbers["rotary_base"],
        **{name: value for name, value in numbers.items() if name.startswith("yarn_")},
    }


_SIZES = (
    *("num_layers", "hidden_size", "moe_ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "kv_channels", "moe_router_topk"),
)


def parallel_layout(fields: Mapping[str, Any]) -> dict[str, int]:
    """The parallel sizes that a checkpoint's fields state; none where they state nothing."""
    sizes = {name: fields.get(name) for name in PARALLEL}
    return {name: size for name, size in sizes.items() if type(size) is int}

"""GPT-OSS in Megatron's words: the fields of `args` and run_config.yaml, read and written as data.

Sources: megatron-core's TransformerConfig, Megatron-LM's arguments, Megatron-Bridge's run_config.
A field that contradicts GPT-OSS is refused with both values: such a model would load and be wrong.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.config import Config
from gptoss_convert.containers import Chunk
from gptoss_convert.containers.paths import open_inside
from gptoss_convert.errors import InputError, IntegrityError, UsageError

RUN_CONFIG = "run_config.yaml"
ITERATION = 1
"""Megatron-LM and Megatron-Bridge refuse iteration 0."""
TRACKER = "latest_checkpointed_iteration.txt"
HF_FOLDER = "hf"
"""Where a Megatron checkpoint carries config.json, tokenizer and template for the way back."""
VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
"""The tensors that Megatron pads with rows to a multiple of its tensor-parallel size."""

_MAX_YAML = 1 << 20
_PARALLEL = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
)
_BRIDGE = {
    "modern": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "legacy": "megatron.bridge.models.gpt_oss.gpt_oss_provider.GPTOSSProvider",
}
"""The provider of Megatron-Bridge from 0.4.0 on, and before: no name serves both."""

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
        unknown = f"no vocabulary size, {stored} rows may hold padding; pass --vocab-size"
        wrong = f"vocab_size {rows!r}, the checkpoint holds {stored} rows"
        raise UsageError(f"{where}: {unknown if rows is None else wrong}")
    return rows


def read_run_config(directory: Path) -> dict[str, Any] | None:
    """The `model` section of Megatron-Bridge's run_config.yaml as plain data, None without one."""
    path = directory / RUN_CONFIG
    if not path.exists():
        return None
    import yaml

    with open_inside(directory, RUN_CONFIG) as file:
        raw = file.read(_MAX_YAML + 1)
    if len(raw) > _MAX_YAML:
        raise InputError(f"{path}: larger than {_MAX_YAML} bytes")
    try:
        content = yaml.safe_load(raw)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else "nested too deep"
        raise IntegrityError(f"{path}: not plain YAML: {reason}") from None
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict):
        raise InputError(f"{path}: no 'model' section")
    return {str(key): value for key, value in model.items()}


def parallel_layout(fields: Mapping[str, Any]) -> dict[str, int]:
    """The parallel sizes that a checkpoint's fields state, those above 1."""
    sizes = {name: fields.get(name) for name in _PARALLEL}
    return {name: size for name, size in sizes.items() if type(size) is int and size > 1}


def check_fields(where: str, fields: Mapping[str, Any], config: Config) -> None:
    """Refuse fields that contradict `config`; raises InputError with field, found and expected."""
    for field, expected in _expected(config).items():
        if field in fields and not _same(fields[field], expected):
            found = fields[field]
            raise InputError(f"{where}: {field} is {found!r}, GPT-OSS here has {expected!r}")


def from_fields(where: str, fields: Mapping[str, Any], vocab_size: int) -> Config:
    """The configuration that `args` or run_config.yaml describe; raises InputError.

    What Megatron does not say (window, YaRN, clamp) is taken as released, and contradicted if the
    fields say something else.
    """
    numbers: dict[str, int] = {}
    for name, choices in _SIZES.items():
        values = [fields[choice] for choice in choices if type(fields.get(choice)) is int]
        if not values:
            raise InputError(f"{where}: no {' or '.join(choices)}; pass --config CONFIG_JSON")
        numbers[name] = values[0]
    config = Config(
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
        notes=(f"configuration from {where}; window, YaRN and clamp as released",),
    )
    check_fields(where, fields, config)
    return config


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
        **_model_fields(config),
        "num_moe_experts": config.num_local_experts,
        "gated_linear_unit": True,
        "rotary_scaling_factor": config.rope_factor,
        "layernorm_epsilon": config.rms_norm_eps,
        "norm_epsilon": config.rms_norm_eps,
        "share_embeddings_and_output_weights": False,
        "untie_embeddings_and_output_weights": True,
        "rotary_interleaved": False,
    }


def _model_fields(config: Config) -> dict[str, Any]:
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
        "yarn_correction_range_round_to_int": False,
    }


def _training_fields(config: Config) -> dict[str, Any]:
    """What both need to build the model and no output depends on, or a loader may choose."""
    return {
        "ffn_hidden_size": config.intermediate_size,
        "add_qkv_bias": True,
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": True,
        "moe_token_dispatcher_type": "alltoall",
        "vocab_size": config.vocab_size,
        "seq_length": config.original_max_position_embeddings,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bf16": True,
        **dict.fromkeys(_PARALLEL, 1),
    }


def common_state(config: Config, layout: str) -> dict[str, Any]:
    """The content of common.pt: what Megatron-LM and Megatron-Bridge read from a checkpoint."""
    metadata: dict[str, Any] = {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    if layout == "per-layer":
        metadata["non_homogeneous_layers"] = True
    return {
        "args": Namespace(**_args(config)),
        "checkpoint_version": 3.0,
        "iteration": ITERATION,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": metadata,
    }


def _args(config: Config) -> dict[str, Any]:
    """Megatron-LM's arguments; `no_save_*`: a plain --load asks for no optimizer and no RNG."""
    return {
        **_model_fields(config),
        **_training_fields(config),
        "window_size": (config.sliding_window - 1, 0),
        "max_position_embeddings": config.max_position_embeddings,
        "group_query_attention": True,
        "add_position_embedding": False,
        "use_rotary_position_embeddings": False,
        "rotary_percent": 1.0,
        "rotary_interleaved": False,
        "rotary_scaling_factor": config.rope_factor,
        "squared_relu": False,
        "swiglu": False,
        "quick_geglu": True,
        "untie_embeddings_and_output_weights": True,
        "apply_layernorm_1p": False,
        "norm_epsilon": config.rms_norm_eps,
        "apply_query_key_layer_scaling": False,
        "num_experts": config.num_local_experts,
        "moe_layer_freq": 1,
        "padded_vocab_size": config.vocab_size,
        "ckpt_format": "torch_dist",
        "no_save_optim": True,
        "no_save_rng": True,
        "iteration": ITERATION,
        "consumed_train_samples": 0,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "world_size": 1,
        "data_parallel_size": 1,
    }


def run_config_yaml(config: Config, bridge: str) -> bytes:
    """run_config.yaml for Megatron-Bridge: `modern` from 0.4.0 on, `legacy` before."""
    import yaml

    content = {
        "_target_": "megatron.bridge.training.config.ConfigContainer",
        "model": {"_target_": _BRIDGE[bridge], **_provider(config)},
        "checkpoint": {
            "_target_": "megatron.bridge.training.config.CheckpointConfig",
            "ckpt_format": "torch_dist",
            "save_optim": False,
            "save_rng": False,
            "fully_parallel_save": True,
        },
        "tokenizer": None,
    }
    return yaml.safe_dump(content, sort_keys=False).encode()


def _provider(config: Config) -> dict[str, Any]:
    """The fields of Megatron-Bridge's provider."""
    bf16 = {"_target_": "torch.bfloat16", "_call_": False}
    init = {
        "_target_": "torch.nn.init.normal_",
        "_partial_": True,
        "_args_": [],
        "mean": 0.0,
        "std": 0.02,
    }
    return {
        **_model_fields(config),
        **_training_fields(config),
        "num_moe_experts": config.num_local_experts,
        "moe_permute_fusion": True,
        "make_vocab_size_divisible_by": 1,
        "should_pad_vocab": False,
        "share_embeddings_and_output_weights": False,
        "layernorm_epsilon": config.rms_norm_eps,
        "gated_linear_unit": True,
        "activation_func": {
            "_target_": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
            "_call_": False,
        },
        "bias_activation_fusion": True,
        "bias_dropout_fusion": False,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "params_dtype": dict(bf16),
        "autocast_dtype": dict(bf16),
        "init_method": dict(init),
        "output_layer_init_method": dict(init),
    }

"""What a Megatron checkpoint says beside its tensors: common.pt's content and run_config.yaml.

Sources: Megatron-LM's `load_args_from_checkpoint` and checks, Megatron-Bridge's run_config.
"""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from gptoss_convert.formats.config import Config
from gptoss_convert.formats.megatron.fields import PARALLEL, model_fields
from gptoss_convert.formats.megatron.files import ITERATION

_BRIDGE = {
    "modern": "megatron.bridge.models.gpt_provider.GPTModelProvider",
    "legacy": "megatron.bridge.models.gpt_oss.gpt_oss_provider.GPTOSSProvider",
}
"""The provider of Megatron-Bridge from 0.4.0 on, and before: no name serves both."""


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
        **dict.fromkeys(PARALLEL, 1),
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
        **model_fields(config),
        **_training_fields(config),
        "window_size": (config.sliding_window - 1, 0),
        "max_position_embeddings": config.max_position_embeddings,
        "group_query_attention": True,
        "add_position_embedding": True,
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
        **model_fields(config),
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

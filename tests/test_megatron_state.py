"""What a converted Megatron checkpoint says beside its tensors: common.pt, run_config.yaml."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import pytest
import yaml

from gptoss_convert import Options, convert
from tests.test_megatron import ARGS, SHAPE, WEIGHTS, run_config
from tests.tiny_files import write_hf_mxfp4
from tests.torch_dist_files import load_common


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Iteration directories by options of the conversion."""
    folder = tmp_path_factory.mktemp("converted")
    write_hf_mxfp4(folder / "hf", SHAPE, WEIGHTS)
    wanted = {
        "modern": Options(to="megatron"),
        "legacy": Options(to="megatron", bridge="legacy", layout="per-layer"),
    }
    for name, options in wanted.items():
        convert(folder / "hf", folder / name, options)
    return {name: folder / name / "iter_0000001" for name in wanted}


def test_common_state_holds_what_megatron_lm_takes_from_a_checkpoint(
    converted: dict[str, Path],
) -> None:
    common = load_common((converted["modern"] / "common.pt").read_bytes())
    assert {k: v for k, v in common.items() if k != "args"} == {
        "checkpoint_version": 3.0,
        "iteration": 1,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    assert type(common["args"]) is Namespace
    args = vars(common["args"])
    same = {k: v for k, v in ARGS.items() if k not in NOT_WRITTEN_ALIKE}
    assert {key: args[key] for key in same} == same
    assert set(LOADED_ARGS.split()) <= args.keys()
    assert args["moe_ffn_hidden_size"] == SHAPE.inter
    assert (args["no_save_optim"], args["no_save_rng"]) == (True, True)
    assert args["padded_vocab_size"] == SHAPE.vocab
    assert args["window_attn_skip_freq"] == 2
    assert args["max_position_embeddings"] == 131072


NOT_WRITTEN_ALIKE = {"moe_ffn_hidden_size", "window_attn_skip_freq"} | {
    name
    for name in ARGS
    if name.endswith("parallel_size") or ARGS[name] is None or "mscale" in name
}
LOADED_ARGS = """
    num_layers hidden_size ffn_hidden_size seq_length num_attention_heads num_query_groups
    group_query_attention kv_channels max_position_embeddings position_embedding_type
    add_position_embedding use_rotary_position_embeddings rotary_base rotary_percent
    rotary_interleaved add_bias_linear add_qkv_bias squared_relu swiglu
    untie_embeddings_and_output_weights apply_layernorm_1p normalization
    apply_query_key_layer_scaling attention_dropout hidden_dropout num_experts
    moe_layer_freq moe_ffn_hidden_size moe_router_topk moe_token_dispatcher_type
    moe_router_pre_softmax moe_grouped_gemm moe_router_score_function padded_vocab_size
    ckpt_format tensor_model_parallel_size pipeline_model_parallel_size world_size
    data_parallel_size consumed_train_samples consumed_valid_samples iteration
"""
"""What Megatron-LM's load_args_from_checkpoint and its checks look up."""


def test_the_naming_of_the_layers_is_part_of_the_common_state(converted: dict[str, Path]) -> None:
    """Loaders ask their model's names with it; without it they would look for stacked ones."""
    common = load_common((converted["legacy"] / "common.pt").read_bytes())
    assert common["content_metadata"]["non_homogeneous_layers"] is True


@pytest.mark.parametrize(
    ("bridge", "provider"),
    [
        ("modern", "megatron.bridge.models.gpt_provider.GPTModelProvider"),
        ("legacy", "megatron.bridge.models.gpt_oss.gpt_oss_provider.GPTOSSProvider"),
    ],
)
def test_run_config_builds_the_model_in_megatron_bridge(
    converted: dict[str, Path], bridge: str, provider: str
) -> None:
    content = yaml.safe_load((converted[bridge] / "run_config.yaml").read_text())
    model = content["model"]
    assert content["_target_"] == "megatron.bridge.training.config.ConfigContainer"
    assert content["checkpoint"] == {
        "_target_": "megatron.bridge.training.config.CheckpointConfig",
        "ckpt_format": "torch_dist",
        "save_optim": False,
        "save_rng": False,
        "fully_parallel_save": True,
    }
    assert content["tokenizer"] is None
    assert model["_target_"] == provider
    expected = yaml.safe_load(run_config())["model"]
    only_args = {"group_query_attention", "quick_geglu", "swiglu", "rotary_percent", "_target_"}
    only_args |= {"untie_embeddings_and_output_weights", "rotary_scaling_factor"}
    for key, value in expected.items():
        if key not in only_args and not key.endswith("parallel_size"):
            assert model[key] == value, key
    for size in ("tensor_model", "pipeline_model", "expert_model", "expert_tensor"):
        assert model[f"{size}_parallel_size"] == 1
    assert (model["should_pad_vocab"], model["make_vocab_size_divisible_by"]) == (False, 1)
    assert (model["yarn_mscale"], model["yarn_mscale_all_dim"]) == (None, None)
    assert model["params_dtype"] == {"_target_": "torch.bfloat16", "_call_": False}


def test_what_stands_beside_the_tensors_declares_a_complete_checkpoint(
    converted: dict[str, Path],
) -> None:
    iteration = converted["modern"]
    assert (iteration.parent / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert json.loads((iteration / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }

"""Tensors that are no GPT-OSS in a known naming are told by what they are, never as damage."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gptoss_convert.errors import InputError
from gptoss_convert.formats.registry import open_checkpoint
from tests import odd_models

ADDED = {
    "v_head.summary.weight": "a value head",
    "value_head.weight": "a value head",
    "score.weight": "a head for classification",
    "model.layers.0.self_attn.rotary_emb.inv_freq": "buffers that are computed",
    "model.layers.0.self_attn.q_proj.lora_A.weight": "LoRA weights",
    "model.layers.0.self_attn.q_proj.lora_A.default.weight": "LoRA weights",
    "model.layers.0.mlp.experts.base_layer.lora_B.weight": "LoRA weights",
    "model.embed_tokens.lora_embedding_A": "LoRA weights",
    "model.layers.0.self_attn.q_proj.lora_magnitude_vector": "LoRA weights",
    "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": "LoRA weights",
    "model.layers.0.mlp.gate_proj.weight": "another architecture",
    "model.layers.0.self_attn.q_norm.weight": "another architecture",
    "model.layers.0.mlp.shared_expert.up_proj.weight": "another architecture",
    "model.layers.0.block_sparse_moe.gate.weight": "another architecture",
    "transformer.h.0.attn.c_attn.weight": "another architecture",
    "model.vision_tower.patch.weight": "another architecture",
    "model.layers.0.self_attn.qkv_proj.weight": "sharded_state",
    "model.layers.0.mlp.experts.w13_weight": "sharded_state",
    "model.layers.0.mlp.experts.gate_proj.scales": "MLX's naming",
    "model.layers.0.mlp.experts.gate_up_proj_weight_scale": "quantised with compressed-tensors",
    "model.layers.0.self_attn.q_proj.weight_global_scale": "quantised with compressed-tensors",
    "model.layers.0.self_attn.k_proj.k_scale": "an FP8 KV cache",
    "decoder.layers.0.self_attention.linear_qkv.weight": "Megatron's naming",
    "blk.0.attn_norm.weight": "llama.cpp's naming",
}


def rename(directory: Path, prefix: str, drop: str = "") -> None:
    file = directory / "model.safetensors"
    tensors = {prefix + name.removeprefix(drop): one for name, one in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("name", ADDED)
def test_a_tensor_of_another_kind_is_named(tmp_path: Path, name: str):
    source = odd_models.save(tmp_path / "source")
    file = source / "model.safetensors"
    save_file({**load_file(file), name: torch.zeros(2, dtype=torch.bfloat16)}, file)
    with pytest.raises(InputError) as refused:
        open_checkpoint(source)
    assert ADDED[name] in str(refused.value)


def test_a_bare_model_is_named(tmp_path: Path):
    source = odd_models.save(tmp_path / "source")
    rename(source, "", drop="model.")
    with pytest.raises(InputError, match="a bare GptOssModel without its head"):
        open_checkpoint(source)


def test_files_of_a_rank_s_own_layout_are_named(tmp_path: Path):
    source = odd_models.save(tmp_path / "source")
    (source / "model.safetensors").rename(source / "model-rank-0-part-0.safetensors")
    with pytest.raises(InputError, match=r"sharded_state \(model-rank-\*-part-\*.safetensors\)"):
        open_checkpoint(source)


def test_an_adapter_without_its_configuration_is_named(tmp_path: Path):
    source = odd_models.save(tmp_path / "source")
    (source / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"LoRA weights \(adapter_model"):
        open_checkpoint(source)


@pytest.mark.parametrize(
    ("file", "told"),
    [
        ("run/step-3/.metadata", "no checkpoint itself, but the folder of some: .* such as step-3"),
        ("run/checkpoint-9/pytorch_model_fsdp_0/x", "such as checkpoint-9"),
        ("run/epoch_0_step_9/model/shard-00001-model-00001-of-00001.safetensors", "such as epoch"),
        ("run/pytorch_model_fsdp_rank0.bin", "flat parameters of FSDP 1"),
        ("run/mp_rank_00_model_states.pt", "python zero_to_fp32.py"),
        ("run/global_step3/mp_rank_00_model_states.pt", "python zero_to_fp32.py .*/run OUT"),
    ],
)
def test_a_trainer_s_folder_is_told_with_what_helps(tmp_path: Path, file: str, told: str):
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(b"")
    with pytest.raises(InputError, match=told):
        open_checkpoint(tmp_path / "run")

"""Directories of tiny models: HF MXFP4, HF BF16, OpenAI `original/` and Megatron torch_dist.

Written by the reference libraries (safetensors, torch.distributed.checkpoint), never by the
project's own writers. Usual calls::

    weights = random_weights(DISTINCT, seed=7)
    write_hf_mxfp4(tmp_path / "mxfp4", DISTINCT, weights)  # 2 shards, index, config.json
    write_hf_bf16(tmp_path / "bf16", DISTINCT, weights)    # the same values, decoded
    write_openai(tmp_path / "original", DISTINCT, weights)
    write_megatron(tmp_path / "megatron" / "iter_0000001", DISTINCT, weights)
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import filesystem, state_dict_saver

from gptoss_convert.containers import Image
from tests.tiny_models import TinyShape, hf_bf16_tensors, megatron_tensors, openai_tensors


def write_hf_mxfp4(directory: Path, shape: TinyShape, weights: Mapping[str, Tensor]) -> Path:
    """Write an HF directory with packed experts and return it; layers may straddle the shards."""
    return _write_hf(directory, hf_config(shape, mxfp4=True), weights)


def write_hf_bf16(directory: Path, shape: TinyShape, weights: Mapping[str, Tensor]) -> Path:
    """Write an HF directory with decoded experts and return it."""
    return _write_hf(directory, hf_config(shape, mxfp4=False), hf_bf16_tensors(weights))


def _write_hf(directory: Path, config: dict[str, object], tensors: Mapping[str, Tensor]) -> Path:
    directory.mkdir(parents=True)
    names, shards = sorted(tensors), ("model-00001-of-00002", "model-00002-of-00002")
    halves = (names[: len(names) // 2], names[len(names) // 2 :])
    weight_map = {}
    for shard, part in zip(shards, halves, strict=True):
        file = f"{shard}.safetensors"
        save_file({n: tensors[n] for n in part}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    return directory


def write_openai(directory: Path, shape: TinyShape, weights: Mapping[str, Tensor]) -> Path:
    """Write an `original/` directory (one file, config.json, dtypes.json) and return it."""
    directory.mkdir(parents=True)
    tensors = openai_tensors(shape, weights)
    save_file(tensors, directory / "model.safetensors")
    tags = {".blocks": "FP4", ".scales": "UE8"}
    dtypes = {name: tags.get(name[-7:], "BF16") for name in tensors}
    (directory / "dtypes.json").write_text(json.dumps(dtypes))
    (directory / "config.json").write_text(json.dumps(openai_config(shape)))
    return directory


def write_megatron(
    iteration: Path,
    shape: TinyShape,
    weights: Mapping[str, Tensor],
    pad_vocab: int = 0,
    without: str | None = None,
) -> Path:
    """Write a torch_dist iteration with stacked keys by torch's own writer and return it.

    `pad_vocab` zero rows follow the vocabulary, as Megatron pads it. Whole-tensor chunks, no
    `_extra_state`: enough for readers, not for Megatron's strict loaders. `without` leaves out the
    tensor whose name ends so.
    """
    tensors = megatron_tensors(shape, weights)
    if without is not None:
        del tensors[next(name for name in tensors if name.endswith(without))]
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        rows = tensors[name].new_zeros(pad_vocab, shape.hidden)
        tensors[name] = torch.cat((tensors[name], rows))
    iteration.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is initialised
        writer = filesystem.FileSystemWriter(iteration)
        state_dict_saver.save(tensors, storage_writer=writer, no_dist=True)
    torch.save(_common_state(), iteration / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common = {"common_backend": "torch", "common_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(backend | common))
    tracker = iteration.parent / "latest_checkpointed_iteration.txt"
    tracker.write_text(iteration.name.removeprefix("iter_").lstrip("0"))
    return iteration


def _common_state() -> dict[str, object]:
    layout = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return {"checkpoint_version": 3.0, "iteration": 1, "content_metadata": layout}


def hf_config(shape: TinyShape, *, mxfp4: bool) -> dict[str, object]:
    """The keys of the published config.json with this model's numbers."""
    sliding_first = ("sliding_attention", "full_attention")
    config: dict[str, object] = {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "attention_dropout": 0.0,
        "eos_token_id": shape.vocab - 2,
        "experts_per_token": 4,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initial_context_length": shape.original_length,
        "initializer_range": 0.02,
        "intermediate_size": shape.inter,
        "layer_types": [sliding_first[n % 2] for n in range(shape.layers)],
        "max_position_embeddings": int(shape.original_length * shape.rope_factor),
        "model_type": "gpt_oss",
        "num_attention_heads": shape.heads,
        "num_experts_per_tok": 4,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "num_local_experts": shape.experts,
        "output_router_logits": False,
        "pad_token_id": shape.vocab - 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": shape.beta_fast,
            "beta_slow": 1.0,
            "factor": shape.rope_factor,
            "original_max_position_embeddings": shape.original_length,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": shape.rope_theta,
        "router_aux_loss_coef": 0.9,
        "sliding_window": shape.window,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "transformers_version": "4.55.0.dev0",
        "use_cache": True,
        "vocab_size": shape.vocab,
    }
    if mxfp4:
        kept = ["self_attn", "mlp.router"]
        config["quantization_config"] = {
            "modules_to_not_convert": [
                *(f"model.layers.*.{name}" for name in kept),
                "model.embed_tokens",
                "lm_head",
            ],
            "quant_method": "mxfp4",
        }
    return config


def openai_config(shape: TinyShape) -> dict[str, object]:
    """Exactly the keys that OpenAI's `ModelConfig` accepts."""
    return {
        "num_hidden_layers": shape.layers,
        "num_experts": shape.experts,
        "experts_per_token": 4,
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inter,
        "swiglu_limit": 7.0,
        "head_dim": shape.head_dim,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "sliding_window": shape.window,
        "initial_context_length": shape.original_length,
        "rope_theta": shape.rope_theta,
        "rope_scaling_factor": shape.rope_factor,
        "rope_ntk_alpha": 1,
        "rope_ntk_beta": shape.beta_fast,
    }


def known(image: Image) -> dict[str, bytes]:
    """The small files of an image whose content is known, by name."""
    return {name: content for name, content in image.closing if isinstance(content, bytes)}

"""Tiny GPT-OSS models with random, realistic weights, in every layout by independent code.

Shares no line with the tables or the codec: each layout is stated by hand, so that a test can hold
the product against it. `tiny_files` writes the same models to directories. Usual calls::

    weights = random_weights(DISTINCT, seed=7)      # HF MXFP4 names -> tensors
    hf_bf16_tensors(weights)                        # the same values, decoded, HF BF16 names
    openai_tensors(DISTINCT, weights)               # OpenAI `original/` names
    megatron_tensors(DISTINCT, weights)             # the 16 stacked torch_dist tensors

Weights sit in `weights` exactly as HF publishes them: BF16, experts as U8 blocks and scales.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TinyShape:
    """The numbers of one tiny model; `heads / kv_heads` query heads share a kv head."""

    layers: int
    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    vocab: int
    window: int = 16
    original_length: int = 128
    rope_factor: float = 32.0
    beta_fast: float = 8.0
    """Below the released 32, so that the ramp of YaRN starts above 0, as it does there."""
    rope_theta: float = 150000.0


DISTINCT = TinyShape(
    layers=4, hidden=224, inter=192, heads=15, kv_heads=5, head_dim=20, experts=8, vocab=353
)
"""No two axes are equally long: 7 and 6 blocks of 32, 5 kv heads, groups of 3 query heads."""

SQUARE = TinyShape(
    layers=4, hidden=128, inter=128, heads=4, kv_heads=2, head_dim=32, experts=8, vocab=256
)
"""hidden == inter == heads * head_dim, as in the released models: no shape betrays a transpose."""

FP4_VALUES = (
    0.0,
    0.5,
    1.0,
    1.5,
    2.0,
    3.0,
    4.0,
    6.0,
    -0.0,
    -0.5,
    -1.0,
    -1.5,
    -2.0,
    -3.0,
    -4.0,
    -6.0,
)


def random_weights(shape: TinyShape, seed: int = 0) -> dict[str, Tensor]:
    """All tensors of one model under their HF MXFP4 names (formats: BF16, U8 blocks and scales)."""
    gen = torch.Generator().manual_seed(seed)

    def normal(*size: int, std: float, mean: float = 0.0) -> Tensor:
        return (torch.randn(*size, generator=gen) * std + mean).to(torch.bfloat16)

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    fan_in = shape.hidden**-0.5
    weights = {
        "model.embed_tokens.weight": normal(shape.vocab, shape.hidden, std=1.0),
        "lm_head.weight": normal(shape.vocab, shape.hidden, std=1.5 * fan_in),
        "model.norm.weight": normal(shape.hidden, std=0.2, mean=1.0),
    }
    for n in range(shape.layers):
        layer = f"model.layers.{n}"
        weights[f"{layer}.input_layernorm.weight"] = normal(shape.hidden, std=0.2, mean=1.0)
        weights[f"{layer}.post_attention_layernorm.weight"] = normal(
            shape.hidden, std=0.2, mean=1.0
        )
        for name, rows in (("q_proj", q), ("k_proj", kv), ("v_proj", kv)):
            weights[f"{layer}.self_attn.{name}.weight"] = normal(
                rows, shape.hidden, std=1.3 * fan_in
            )
            weights[f"{layer}.self_attn.{name}.bias"] = normal(rows, std=0.5)
        weights[f"{layer}.self_attn.o_proj.weight"] = normal(shape.hidden, q, std=q**-0.5)
        weights[f"{layer}.self_attn.o_proj.bias"] = normal(shape.hidden, std=0.3)
        weights[f"{layer}.self_attn.sinks"] = normal(shape.heads, std=1.0, mean=1.0)
        weights[f"{layer}.mlp.router.weight"] = normal(
            shape.experts, shape.hidden, std=2.0 * fan_in
        )
        weights[f"{layer}.mlp.router.bias"] = normal(shape.experts, std=1.0)
        weights |= _random_experts(shape, f"{layer}.mlp.experts", gen)
    return weights


def _random_experts(shape: TinyShape, prefix: str, gen: torch.Generator) -> dict[str, Tensor]:
    """Blocks, scales and biases of one layer; biases large enough that activations are clamped."""
    sizes = {
        "gate_up_proj": (2 * shape.inter, shape.hidden),
        "down_proj": (shape.hidden, shape.inter),
    }
    experts = {}
    for name, (rows, columns) in sizes.items():
        blocks = (shape.experts, rows, columns // 32)
        experts[f"{prefix}.{name}_blocks"] = torch.randint(
            0, 256, (*blocks, 16), generator=gen, dtype=torch.uint8
        )
        experts[f"{prefix}.{name}_scales"] = torch.randint(
            119, 123, blocks, generator=gen, dtype=torch.uint8
        )
        std = 3.0 if name == "gate_up_proj" else 0.3
        bias = torch.randn(shape.experts, rows, generator=gen) * std
        experts[f"{prefix}.{name}_bias"] = bias.to(torch.bfloat16)
    return experts


def decode_mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """BF16 `[..., K]` of blocks u8 `[..., K/32, 16]` and scales u8 `[..., K/32]`, exactly."""
    codes = torch.stack((blocks & 15, blocks >> 4), dim=-1).flatten(-2)
    values = torch.tensor(FP4_VALUES)[codes.long()]
    return torch.ldexp(values, scales.int().unsqueeze(-1) - 127).flatten(-2).to(torch.bfloat16)


def hf_bf16_tensors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The HF BF16 names: experts input-major, `[E, H, 2I]` and `[E, I, H]`."""
    bf16 = {}
    for name, tensor in weights.items():
        if name.endswith("_blocks"):
            stem = name.removesuffix("_blocks")
            rows = decode_mxfp4(tensor, weights[f"{stem}_scales"])
            bf16[stem] = rows.transpose(1, 2).contiguous()
        elif not name.endswith("_scales"):
            bf16[name] = tensor
    return bf16


def openai_tensors(shape: TinyShape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names of OpenAI's `original/` directory: q, k, v concatenated, experts packed."""
    original = {
        "embedding.weight": weights["model.embed_tokens.weight"],
        "norm.scale": weights["model.norm.weight"],
        "unembedding.weight": weights["lm_head.weight"],
    }
    for n in range(shape.layers):
        hf, block = f"model.layers.{n}", f"block.{n}"
        for kind in ("weight", "bias"):
            parts = [weights[f"{hf}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            original[f"{block}.attn.qkv.{kind}"] = torch.cat(parts)
            original[f"{block}.attn.out.{kind}"] = weights[f"{hf}.self_attn.o_proj.{kind}"]
            original[f"{block}.mlp.gate.{kind}"] = weights[f"{hf}.mlp.router.{kind}"]
        original[f"{block}.attn.norm.scale"] = weights[f"{hf}.input_layernorm.weight"]
        original[f"{block}.mlp.norm.scale"] = weights[f"{hf}.post_attention_layernorm.weight"]
        original[f"{block}.attn.sinks"] = weights[f"{hf}.self_attn.sinks"]
        for mlp, name in (("mlp1", "gate_up_proj"), ("mlp2", "down_proj")):
            for part in ("blocks", "scales"):
                source = f"{hf}.mlp.experts.{name}_{part}"
                original[f"{block}.mlp.{mlp}_weight.{part}"] = weights[source]
            original[f"{block}.mlp.{mlp}_bias"] = weights[f"{hf}.mlp.experts.{name}_bias"]
    return original


def megatron_tensors(shape: TinyShape, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The 16 stacked torch_dist tensors: QKV grouped by kv head, fc1 as `[gate; up]` halves."""
    bf16 = hf_bf16_tensors(weights)

    def stacked(name: str) -> Tensor:
        return torch.stack([bf16[f"model.layers.{n}.{name}"] for n in range(shape.layers)])

    def grouped_qkv(kind: str) -> Tensor:
        parts = []
        for p in "qkv":
            rows = stacked(f"self_attn.{p}_proj.{kind}")
            parts.append(rows.unflatten(1, (shape.kv_heads, -1, shape.head_dim)))
        return torch.cat(parts, dim=2).flatten(1, 3).contiguous()

    fc1 = stacked("mlp.experts.gate_up_proj").transpose(2, 3)
    fc1_bias = stacked("mlp.experts.gate_up_proj_bias")
    attention, mlp = "decoder.layers.self_attention", "decoder.layers.mlp"
    return {
        "embedding.word_embeddings.weight": bf16["model.embed_tokens.weight"],
        "output_layer.weight": bf16["lm_head.weight"],
        "decoder.final_layernorm.weight": bf16["model.norm.weight"],
        f"{attention}.linear_qkv.layer_norm_weight": stacked("input_layernorm.weight"),
        f"{attention}.linear_qkv.weight": grouped_qkv("weight"),
        f"{attention}.linear_qkv.bias": grouped_qkv("bias"),
        f"{attention}.linear_proj.weight": stacked("self_attn.o_proj.weight"),
        f"{attention}.linear_proj.bias": stacked("self_attn.o_proj.bias"),
        f"{attention}.core_attention.softmax_offset": stacked("self_attn.sinks"),
        "decoder.layers.pre_mlp_layernorm.weight": stacked("post_attention_layernorm.weight"),
        f"{mlp}.router.weight": stacked("mlp.router.weight"),
        f"{mlp}.router.bias": stacked("mlp.router.bias"),
        f"{mlp}.experts.experts.linear_fc1.weight": torch.cat(
            (fc1[:, :, 0::2], fc1[:, :, 1::2]), 2
        ),
        f"{mlp}.experts.experts.linear_fc1.bias": torch.cat(
            (fc1_bias[..., 0::2], fc1_bias[..., 1::2]), -1
        ),
        f"{mlp}.experts.experts.linear_fc2.weight": stacked("mlp.experts.down_proj")
        .transpose(2, 3)
        .contiguous(),
        f"{mlp}.experts.experts.linear_fc2.bias": stacked("mlp.experts.down_proj_bias"),
    }

"""Values for the tensors of recorded adapters: a formula of the tensor's name, exact in BF16.

A recorded adapter states names, dtypes and shapes as its writer saved them, and what its writer
merged; the values are made here, so that a record is small. They have few bits: products and sums
of them are exact in float32, so that a merge has the same bits whatever order a library adds in.
Needs numpy alone: `tools/record_adapters.py` runs this beside the writers.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import numpy as np

BASES = {
    "distinct": {
        "hidden": 64,
        "inter": 96,
        "experts": 5,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 22,
    },
    "square": {"hidden": 64, "inter": 64, "experts": 5, "heads": 6, "kv_heads": 2, "head_dim": 22},
}
LAYERS, VOCAB = 2, 150


def config(base: str) -> dict[str, object]:
    """A config.json of one of the two tiny bases."""
    shape = BASES[base]
    return {
        "architectures": ["GptOssForCausalLM"],
        "attention_bias": True,
        "experts_per_token": 2,
        "head_dim": shape["head_dim"],
        "hidden_act": "silu",
        "hidden_size": shape["hidden"],
        "initial_context_length": 128,
        "intermediate_size": shape["inter"],
        "layer_types": ["sliding_attention", "full_attention"],
        "max_position_embeddings": 4096,
        "model_type": "gpt_oss",
        "num_attention_heads": shape["heads"],
        "num_experts_per_tok": 2,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": shape["kv_heads"],
        "num_local_experts": shape["experts"],
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "factor": 32.0,
            "original_max_position_embeddings": 128,
            "rope_type": "yarn",
            "truncate": False,
        },
        "rope_theta": 150000,
        "sliding_window": 8,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "vocab_size": VOCAB,
    }


def base_shapes(base: str) -> dict[str, tuple[int, ...]]:
    """The tensors of a BF16 directory of the base, by name."""
    s = BASES[base]
    hidden, inter, experts = s["hidden"], s["inter"], s["experts"]
    q, kv = s["heads"] * s["head_dim"], s["kv_heads"] * s["head_dim"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (VOCAB, hidden),
    }
    for n in range(LAYERS):
        layer = {
            "input_layernorm.weight": (hidden,),
            "post_attention_layernorm.weight": (hidden,),
            "self_attn.sinks": (s["heads"],),
            "self_attn.o_proj.weight": (hidden, q),
            "self_attn.o_proj.bias": (hidden,),
            "mlp.router.weight": (experts, hidden),
            "mlp.router.bias": (experts,),
            "mlp.experts.gate_up_proj": (experts, hidden, 2 * inter),
            "mlp.experts.gate_up_proj_bias": (experts, 2 * inter),
            "mlp.experts.down_proj": (experts, inter, hidden),
            "mlp.experts.down_proj_bias": (experts, hidden),
        }
        for p, rows in (("q", q), ("k", kv), ("v", kv)):
            layer[f"self_attn.{p}_proj.weight"] = (rows, hidden)
            layer[f"self_attn.{p}_proj.bias"] = (rows,)
        shapes |= {f"model.layers.{n}.{name}": shape for name, shape in layer.items()}
    return shapes


def base_values(name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 values of a base's tensor: seven bits and four exponents, exact in BF16."""
    bits = _bits(f"base {name}", shape)
    mantissa = (bits % 255).astype(np.float32) - 127
    return mantissa / np.float32(128) / np.exp2((bits >> 9) % 4).astype(np.float32)


def adapter_values(name: str, shape: Sequence[int]) -> np.ndarray:
    """float32 values of an adapter's tensor: 31 steps of 1/64, exact in BF16; magnitudes near 2."""
    steps = (_bits(f"adapter {name}", shape) % 31).astype(np.float32) - 15
    return steps / 64 + (2 if "magnitude" in name else 0)


def _bits(name: str, shape: Sequence[int]) -> np.ndarray:
    """Twenty well-mixed bits for each element (SplitMix64), seeded by the tensor's name."""
    seed = np.uint64(zlib.crc32(name.encode()) << 32)
    x = np.arange(math.prod(shape), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + seed
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return (x >> np.uint64(44)).astype(np.int64).reshape(tuple(shape))


def bf16(values: np.ndarray) -> np.ndarray:
    """The bits of values that are exact in BF16."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)

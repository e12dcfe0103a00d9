"""The names of trainers, stated by hand from Hugging Face's: what a table must not decide alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tests.tiny_models import TinyShape

_TORCHTITAN = {
    "model.embed_tokens": "tok_embeddings",
    "model.norm": "norm",
    "lm_head": "lm_head",
    "input_layernorm": "attention_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attention.qkv_linear.wq",
    "self_attn.k_proj": "attention.qkv_linear.wk",
    "self_attn.v_proj": "attention.qkv_linear.wv",
    "self_attn.o_proj": "attention.wo",
    "self_attn.sinks": "attention.sinks",
    "mlp.router": "moe.router.gate",
    "mlp.experts.gate_up_proj": "moe.routed_experts.inner_experts.mlp1_weight_EGD",
    "mlp.experts.gate_up_proj_bias": "moe.routed_experts.inner_experts.mlp1_bias_EG",
    "mlp.experts.down_proj": "moe.routed_experts.inner_experts.mlp2_weight_EDF",
    "mlp.experts.down_proj_bias": "moe.routed_experts.inner_experts.mlp2_bias_ED",
}
_BEFORE = {
    "lm_head": "output",
    "qkv_linear.": "",
    "routed_experts.inner_experts": "experts",
    "_EGD": "",
    "_EG": "",
    "_EDF": "",
    "_ED": "",
}


def torchtitan(model: Mapping[str, Tensor], *, first: bool = False) -> dict[str, Tensor]:
    """A model as torchtitan holds it: experts output-major; of its first names, or its last."""
    named = {}
    for name, tensor in model.items():
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        inside = name.startswith("model.layers.")
        stem, ending = (rest if inside else name), ""
        if stem.endswith((".weight", ".bias")):
            stem, _, ending = stem.rpartition(".")
        new = f"layers.{layer}." * inside + _TORCHTITAN[stem] + f".{ending}" * bool(ending)
        for now, before in _BEFORE.items() if first else ():
            new = new.replace(now, before)
        matrix = stem.endswith(("gate_up_proj", "down_proj"))
        named[new] = tensor.transpose(1, 2).contiguous() if matrix else tensor
    return named


def fused(model: Mapping[str, Tensor], shape: TinyShape) -> dict[str, Tensor]:
    """torchtitan's opt-in q, k and v in one: for each kv head its queries', its key's, its value's
    rows."""
    made = {name: one for name, one in model.items() if ".qkv_linear." not in name}
    for n in range(shape.layers):
        stem = f"layers.{n}.attention.qkv_linear"
        for kind in ("weight", "bias"):
            parts = [model[f"{stem}.{one}.{kind}"] for one in ("wq", "wk", "wv")]
            by_head = [part.unflatten(0, (shape.kv_heads, -1)) for part in parts]
            made[f"{stem}.wqkv.{kind}"] = torch.cat(by_head, 1).flatten(0, 1).contiguous()
    return made


def per_expert(model: Mapping[str, Tensor], writer: str) -> dict[str, Tensor]:
    """A model with a tensor for each expert: as unsloth has it, or llm-compressor `before` #2647,
    `since`, and `now`, after #3100."""
    named = {}
    for name, tensor in model.items():
        stem, found, kind = name.partition(".mlp.experts.")
        if not found:
            named[name.replace("router.", "router.linear.") if writer == "unsloth" else name] = (
                tensor
            )
            continue
        which, ending = kind.split("_proj")[0], "bias" if kind.endswith("_bias") else "weight"
        rows = tensor if ending == "bias" else tensor.transpose(1, 2)
        for expert, one in enumerate(rows):
            for place, part in _parts(writer, which, one):
                named[f"{stem}.mlp.experts.{place.format(expert)}.{ending}"] = part.contiguous()
    return named


def _parts(writer: str, which: str, rows: Tensor) -> list[tuple[str, Tensor]]:
    """Names and rows that an expert's interleaved rows of gate and up, or its down, become."""
    if writer == "unsloth":
        return [(f"{which}_projs.{{}}", rows)]
    stem = "experts.{}" if writer == "before" else "{}"
    if which == "down":
        return [(f"{stem}.down_proj", rows)]
    half = len(rows) // 2
    gate, up = (rows[:half], rows[half:]) if writer == "since" else (rows[0::2], rows[1::2])
    return [(f"{stem}.gate_proj", gate), (f"{stem}.up_proj", up)]

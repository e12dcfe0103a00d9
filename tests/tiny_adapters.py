"""Adapters for the models of `tiny_models`, in PEFT's layout and by hand: random float32 values."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.adapter_files import write_adapter
from tests.tiny_models import TinyShape

ATTENTION, EXPERTS, ROUTER = "attention", "experts", "router"
SYNTHETIC = TinyShape(
    layers=4, hidden=224, inter=160, heads=15, kv_heads=3, head_dim=32, experts=8, vocab=288
)
"""What `synth` writes by default."""
RANK, ALPHA = 3, 12
"""Twice as strong as alpha by the root of the rank would be, and not a power of two apart."""


def peft_tensors(
    shape: TinyShape, parts: Iterable[str], seed: int = 0, rank: int = RANK, size: float = 0.1
) -> dict[str, Tensor]:
    """Halves of all layers, so large that every layer's outputs change visibly."""
    gen = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}

    def pair(stem: str, a: tuple[int, int], b: tuple[int, int]) -> None:
        for half, sides in (("A", a), ("B", b)):
            values = torch.randn(*sides, generator=gen) * size
            tensors[f"base_model.model.{stem}.lora_{half}.weight"] = values

    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    for n in range(shape.layers):
        layer = f"model.layers.{n}"
        if ATTENTION in parts:
            for p, rows, columns in (
                ("q", q, shape.hidden),
                ("k", kv, shape.hidden),
                ("v", kv, shape.hidden),
                ("o", shape.hidden, q),
            ):
                pair(f"{layer}.self_attn.{p}_proj", (rank, columns), (rows, rank))
        if EXPERTS in parts:
            all_ranks = shape.experts * rank
            gate_up = ((all_ranks, shape.hidden), (2 * shape.inter, all_ranks))
            pair(f"{layer}.mlp.experts.base_layer", *gate_up)
            pair(f"{layer}.mlp.experts", (all_ranks, shape.inter), (shape.hidden, all_ranks))
        if ROUTER in parts:
            pair(f"{layer}.mlp.router", (rank, shape.hidden), (shape.experts, rank))
    return tensors


def settings(**more: Any) -> dict[str, Any]:
    """adapter_config.json of PEFT 0.18.1, whose experts are never swapped."""
    return {
        "base_model_name_or_path": "openai/gpt-oss-20b",
        "lora_alpha": ALPHA,
        "peft_type": "LORA",
        "peft_version": "0.18.1",
        "r": RANK,
        **more,
    }


def write_peft(
    root: Path, shape: TinyShape, parts: Iterable[str], seed: int = 0, **more: Any
) -> Path:
    """An adapter's directory."""
    return write_adapter(root, peft_tensors(shape, [*parts], seed), settings(**more))

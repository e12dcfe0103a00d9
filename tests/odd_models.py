"""Small models that transformers itself writes, of any legal configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GptOssConfig, GptOssForCausalLM

TINY: dict[str, Any] = {
    "num_hidden_layers": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 6,
    "vocab_size": 40,
    "sliding_window": 4,
    "max_position_embeddings": 64,
    "eos_token_id": 2,
    "pad_token_id": 3,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 4.0,
        "beta_fast": 8.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 16,
        "rope_theta": 1000.0,
    },
}
"""TRL's tiny GPT-OSS has hidden 8, too: no multiple of a block of MXFP4."""


def save(directory: Path, dtype: torch.dtype = torch.bfloat16, **changes: Any) -> Path:
    """Write a random model as `save_pretrained` does, and return its directory."""
    torch.manual_seed(0)
    config = GptOssConfig(**{**TINY, **changes}, architectures=["GptOssForCausalLM"])
    model = GptOssForCausalLM(config)
    model.to(dtype)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    model.save_pretrained(directory)
    return directory


def edit(directory: Path, **changes: Any) -> Path:
    """Change keys of config.json; None of Python is null, `...` takes a key away."""
    path = directory / "config.json"
    content = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept), encoding="utf-8")
    return directory

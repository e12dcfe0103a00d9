"""What stands between an expert's two products."""

from __future__ import annotations

import torch
from torch import Tensor

from gptoss_convert.witness.model import ModelConfig


def swiglu(gate: Tensor, up: Tensor, config: ModelConfig) -> Tensor:
    """Clamped gated QuickGELU: the gate is clamped from above only, up on both sides, plus one."""
    gate = gate.clamp(max=config.swiglu_limit)
    up = up.clamp(-config.swiglu_limit, config.swiglu_limit)
    return gate * torch.sigmoid(config.swiglu_alpha * gate) * (up + config.swiglu_offset)

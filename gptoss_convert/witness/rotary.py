"""Rotary embedding with YaRN: angles, and the turn of queries and keys. Letters as in `forward`."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from gptoss_convert.witness.model import ModelConfig


def rotary_tables(config: ModelConfig, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin `[S, h]` in float32, times YaRN's concentration 0.1 ln(factor) + 1."""
    inverse_h = _inverse_on(config, device)
    angles_Sh = torch.arange(length, device=device).float().unsqueeze(1) * inverse_h
    concentration = config.rope_concentration
    if concentration is None:
        concentration = 0.1 * math.log(config.rope_factor) + 1.0 if config.rope_factor > 1 else 1.0
    return angles_Sh.cos() * concentration, angles_Sh.sin() * concentration


@lru_cache(8)
def _inverse_on(config: ModelConfig, device: torch.device) -> Tensor:
    """The same tensor again: to copy it for each sequence would wait for the device each time."""
    return inverse_frequencies(config).to(device)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """YaRN's inverse frequencies `[h]` in float32 (Peng et al. 2023, "NTK-by-parts").

    Fast frequencies stay, slow ones are divided by the factor, a linear ramp lies between.
    """
    half = config.head_dim // 2
    period_h = config.rope_theta ** (
        torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    )
    if config.rope_factor == 1:
        return 1.0 / period_h

    def rotations(count: float) -> float:
        """The frequency index that turns `count` times within the original length."""
        turns = config.rope_original_length / (count * 2 * math.pi)
        return half * math.log(turns) / math.log(config.rope_theta)

    low, high = rotations(config.rope_beta_fast), rotations(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, config.head_dim - 1)
    # Backwards where low > high, as transformers has it: a short original length, or betas swapped.
    ramp_h = (torch.arange(half, dtype=torch.float32) - low) / (high - low or 1e-3)
    kept_h = 1.0 - ramp_h.clamp(0, 1)
    slowed_h = 1.0 / (config.rope_factor * period_h)
    return slowed_h * (1.0 - kept_h) + (1.0 / period_h) * kept_h


def rotate(x_SNH: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
    """Rotary embedding, half-split: component i turns with component i + H/2."""
    first, second = x_SNH.float().chunk(2, dim=-1)
    cos, sin = cos_Sh.unsqueeze(1), sin_Sh.unsqueeze(1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x_SNH.dtype)


def rotate_interleaved(x_SNH: Tensor, cos_Sh: Tensor, sin_Sh: Tensor) -> Tensor:
    """Rotary embedding, interleaved: component 2i turns with component 2i + 1."""
    halves = torch.cat((x_SNH[..., 0::2], x_SNH[..., 1::2]), dim=-1)
    first, second = rotate(halves, cos_Sh, sin_Sh).chunk(2, dim=-1)
    return torch.stack((first, second), dim=-1).flatten(-2)

"""What a forward pass needs of a model: its numbers, and the weights of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from gptoss_convert.witness.fp4 import Packed

ExpertMatrices = Tensor | Packed
"""One matrix per expert, `[expert, out, in]`, or the same in MXFP4."""


@dataclass(frozen=True)
class ModelConfig:
    """Every number the forward pass depends on."""

    hidden: int
    inter: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    experts_per_token: int
    vocab: int
    sliding: tuple[bool, ...]
    """For each layer whether it attends within the window only; its length is the layer count."""
    window: int
    """Keys a sliding layer sees: the token itself and `window - 1` before it."""
    rope_theta: float
    rope_factor: float
    rope_original_length: int
    rope_beta_fast: float
    rope_beta_slow: float
    rope_truncate: bool
    """Whether YaRN's range is rounded to whole frequencies; released models do not round."""
    swiglu_alpha: float
    swiglu_limit: float
    norm_eps: float
    # GPT-OSS leaves no choice about what follows: no configuration says it.
    rope_concentration: float | None = None
    """Factor of cosines and sines; None is YaRN's own, 0.1 ln(factor) + 1."""
    rope_interleaved: bool = False
    """Whether component 2i turns with 2i + 1; else i turns with i + head_dim / 2."""
    softmax_before_choice: bool = False
    """Whether a router's shares are a softmax over all experts, not over the chosen ones."""
    swiglu_offset: float = 1.0
    """What is added to `up`."""
    expert_inputs: torch.dtype | None = None
    """Dtype through which the inputs of the experts' products are rounded; None rounds nothing."""


@dataclass(frozen=True)
class LayerWeights:
    """The weights of one layer in any float dtype.

    Matrices are `[out, in]`, those of the experts `[expert, out, in]`, biases `[out]` and
    `[expert, out]`, norms `[hidden]`, sinks `[heads]`.
    """

    attention_norm: Tensor
    q_weight: Tensor
    q_bias: Tensor
    k_weight: Tensor
    k_bias: Tensor
    v_weight: Tensor
    v_bias: Tensor
    sinks: Tensor
    o_weight: Tensor
    o_bias: Tensor
    mlp_norm: Tensor
    router_weight: Tensor
    router_bias: Tensor
    gate_weight: ExpertMatrices
    gate_bias: Tensor
    up_weight: ExpertMatrices
    up_bias: Tensor
    down_weight: ExpertMatrices
    down_bias: Tensor


T = TypeVar("T", Tensor, Packed)


def fresh(held: T) -> T:
    """`held`, or a copy: row-major, and alone in memory that begins where an allocation does.

    Kernels round differently for other strides or alignments; the same weights must reach them in
    one form, however a checkpoint stores them.
    """
    if isinstance(held, Packed):
        return Packed(fresh(held.blocks), fresh(held.scales))
    alone = held.storage_offset() == 0 and held.untyped_storage().nbytes() == held.nbytes
    if alone and held.is_contiguous():
        return held
    return held.clone(memory_format=torch.contiguous_format)

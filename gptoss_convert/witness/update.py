"""How much of a fine-tune is left: the tuned model, the model made from it, and their base.

The outputs of each expert are compared on the tuned model's own inputs and routing. The update is
what the tuned expert adds beyond the base's; kept is what of it the other model's expert adds too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.model import LayerWeights, ModelConfig
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.rows import rows_by_expert
from gptoss_convert.witness.tokens import TokenSequence
from gptoss_convert.witness.walk import Prompts, after_attention, with_operands

_POSITIONS = 256
"""Logits held at once."""


@dataclass(frozen=True)
class LayerUpdate:
    """One layer; lists are by expert, None where no token met it or nothing was updated."""

    stream_error: float
    """Mean relative error of the residual stream behind the layer, TARGET against SOURCE."""
    stream_update: float
    """The same of the base: what dropping all updates would do."""
    tokens: tuple[int, ...]
    kept: tuple[float | None, ...]
    """The part of the update that TARGET's experts still add: their projection on it."""
    error: tuple[float | None, ...]
    """Norm of what TARGET's experts add wrongly, over the norm of the update."""


@dataclass(frozen=True)
class UpdateReport:
    """What is left of a fine-tune, on tokens held out."""

    positions: int
    kl: float
    """Mean KL(SOURCE || TARGET), in nats."""
    kl_base: float
    """Mean KL(base || SOURCE): what the fine-tune did."""
    layers: tuple[LayerUpdate, ...]


def update_kept(
    source: Reader,
    target: Reader,
    base: Reader,
    sequences: Sequence[TokenSequence],
    device: torch.device,
    numerics: Numerics,
    advance: Callable[[int], None] = lambda layer: None,
) -> UpdateReport:
    """Walk all three models over the sequences, one layer of each on the device."""
    prompts = Prompts.of([one.tokens for one in sequences], device)
    sides, config = (source, target, base), source.config
    layers: list[LayerUpdate] = []
    with forward.exact_products():
        streams = [forward.embed(prompts.tokens, one.embedding(), numerics) for one in sides]
        for index in range(len(config.sliding)):
            weights = [with_operands(one.layer(index), numerics) for one in sides]
            streams = [
                after_attention(x_TD, prompts.lengths, held, config, index, numerics)
                for x_TD, held in zip(streams, weights, strict=True)
            ]
            tokens, kept, error = _by_expert(streams[0], weights, config)
            streams = [
                _after_experts(x_TD, held, config, numerics)
                for x_TD, held in zip(streams, weights, strict=True)
            ]
            off, without = (metrics.divergence(streams[0], other).mean for other in streams[1:])
            layers.append(LayerUpdate(off, without, tokens, kept, error))
            advance(index)
        kl, kl_base = _divergences(sides, streams, config, numerics)
    return UpdateReport(len(prompts.tokens), kl, kl_base, tuple(layers))


def _after_experts(
    x_TD: Tensor, weights: LayerWeights, config: ModelConfig, numerics: Numerics
) -> Tensor:
    routing = forward.router(x_TD, weights, config)
    normed_TD = forward.rms_norm(x_TD, weights.mlp_norm, config.norm_eps)
    (sum_TD,) = forward.experts([normed_TD], [routing], weights, config, numerics)
    return sum_TD.add_(x_TD)


def _by_expert(
    x_TD: Tensor, sides: Sequence[LayerWeights], config: ModelConfig
) -> tuple[tuple[int, ...], tuple[float | None, ...], tuple[float | None, ...]]:
    """Tokens, kept and error of each expert, on the tuned model's inputs and routing."""
    routing = forward.router(x_TD, sides[0], config)
    normed_TD = forward.rms_norm(x_TD, sides[0].mlp_norm, config.norm_eps)
    rows = rows_by_expert(routing.chosen, config.experts)
    kept: list[float | None] = []
    error: list[float | None] = []
    for e, places in enumerate(rows):
        share_T1 = routing.shares.flatten()[places].double().unsqueeze(1)
        x = normed_TD[places // config.experts_per_token]
        tuned, made, base = (_output(x, one, e, config).double() * share_T1 for one in sides)
        update, change = tuned - base, made - base
        size = float(update.square().sum())
        kept.append(float((update * change).sum()) / size if size else None)
        error.append(math.sqrt(float((change - update).square().sum()) / size) if size else None)
    return tuple(len(places) for places in rows), tuple(kept), tuple(error)


def _output(x_TD: Tensor, weights: LayerWeights, e: int, config: ModelConfig) -> Tensor:
    """What an expert makes of tokens, `[T, D]`."""
    gate_FD, up_FD, down_DF = (
        forward.dense(matrices[e], x_TD.dtype)
        for matrices in (weights.gate_weight, weights.up_weight, weights.down_weight)
    )
    gate = forward.linear(x_TD, gate_FD, weights.gate_bias[e])
    up = forward.linear(x_TD, up_FD, weights.up_bias[e])
    inner_TF = forward.swiglu(gate, up, config)
    return forward.linear(inner_TF, down_DF, weights.down_bias[e])


def _divergences(
    sides: Sequence[Reader], streams: Sequence[Tensor], config: ModelConfig, numerics: Numerics
) -> tuple[float, float]:
    """Mean KL(source || target) and KL(base || source), in nats."""
    norms = [one.norm() for one in sides]
    matrices = [forward.dense(one.unembedding(), numerics.dtype) for one in sides]
    found: list[Tensor] = []
    for parts in zip(*(x_TD.split(_POSITIONS) for x_TD in streams), strict=True):
        source, target, base = (
            forward.logits(x, norm, matrix, config)
            for x, norm, matrix in zip(parts, norms, matrices, strict=True)
        )
        none_T = torch.full(source.shape[:1], -1, device=source.device)
        pairs = (source, target), (base, source)
        found.append(torch.stack([metrics.score(*pair, none_T).kl for pair in pairs]))
    kl, kl_base = torch.cat(found, dim=1)
    return metrics.mean(kl), metrics.mean(kl_base)

"""Walk a reader through the forward pass, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptoss_convert.witness import forward
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.model import LayerWeights, ModelConfig
from gptoss_convert.witness.readers import Reader, SubBlock


@dataclass(frozen=True)
class Prompts:
    """A batch: token sequences as one row of tokens `[T]` and the lengths they are cut at."""

    tokens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def of(cls, sequences: Sequence[Sequence[int]], device: torch.device) -> Prompts:
        """The sequences one after another, on `device`."""
        flat = [token for sequence in sequences for token in sequence]
        tokens = torch.tensor(flat, dtype=torch.int64, device=device)
        return cls(tokens, tuple(len(sequence) for sequence in sequences))

    def positions(self) -> Tensor:
        """The position of each token within its own sequence, int64 `[T]`."""
        device = self.tokens.device
        return torch.cat([torch.arange(length, device=device) for length in self.lengths])


@dataclass(frozen=True)
class State:
    """What a sub-block of a layer computed, by batch; valid until the walk goes on."""

    layer: int
    block: SubBlock
    values: Sequence[Tensor]
    """Residual stream `[T, D]` after attention and experts, router logits `[T, E]` between."""
    chosen: Sequence[Tensor] = ()
    """After the router: experts of each token, `[T, A]`, strongest first."""


def walk(reader: Reader, batches: Sequence[Prompts], numerics: Numerics) -> Iterator[State]:
    """The state after each sub-block in turn; to be consumed within `forward.exact_products`.

    Every product is of one batch alone, so no batch's bits depend on the others; weights are
    decoded once for all of them.
    """
    reader.prepare(0)
    embedding_VD = reader.embedding()
    streams = [forward.embed(batch.tokens, embedding_VD, numerics) for batch in batches]
    del embedding_VD
    lengths = [batch.lengths for batch in batches]
    layers = len(reader.config.sliding)
    for index in range(layers):
        weights = reader.layer(index)
        if index + 1 < layers:
            reader.prepare(index + 1)
        yield from layer_states(streams, lengths, weights, reader.config, index, numerics)
        del weights  # before those of the next layer arrive


def layer_states(
    streams: list[Tensor],
    lengths: Sequence[Sequence[int]],
    weights: LayerWeights,
    config: ModelConfig,
    layer: int,
    numerics: Numerics,
) -> Iterator[State]:
    """Take the residual stream of each batch through one layer, in place of the one before."""
    weights = with_operands(weights, numerics)
    for n, x_TD in enumerate(streams):
        streams[n] = after_attention(x_TD, lengths[n], weights, config, layer, numerics)
        del x_TD
    yield State(layer, "attention", streams)
    routings = [forward.router(x_TD, weights, config) for x_TD in streams]
    yield State(layer, "router", [r.logits for r in routings], [r.chosen for r in routings])
    normed = (forward.rms_norm(x_TD, weights.mlp_norm, config.norm_eps) for x_TD in streams)
    for n, sum_TD in enumerate(forward.experts(normed, routings, weights, config, numerics)):
        streams[n] = sum_TD.add_(streams[n])
    del normed, routings
    yield State(layer, "experts", streams)


def after_attention(
    x_TD: Tensor,
    lengths: Sequence[int],
    weights: LayerWeights,
    config: ModelConfig,
    layer: int,
    numerics: Numerics,
) -> Tensor:
    """The residual stream of one batch behind a layer's attention; weights of `with_operands`."""
    window = config.window if config.sliding[layer] else None
    normed_TD = forward.rms_norm(x_TD, weights.attention_norm, config.norm_eps)
    mixed = [
        forward.attention(x_SD, weights, config, window, numerics)
        for x_SD in normed_TD.split(lengths)
    ]
    return torch.cat(mixed).add_(x_TD)


def with_operands(weights: LayerWeights, numerics: Numerics) -> LayerWeights:
    """The weights with every operand of a product dense, but for the matrices of the experts.

    Whole biases, before one expert's is taken: all its rows are aligned as whatever they were
    stored as.
    """
    matrices = [f"{name}_weight" for name in ("q", "k", "v", "o", "router")]
    biases = [f"{name}_bias" for name in ("q", "k", "v", "o", "router", "gate", "up", "down")]
    named = {name: forward.operand(getattr(weights, name), numerics) for name in matrices}
    named |= {name: forward.dense(getattr(weights, name), numerics.dtype) for name in biases}
    return replace(weights, **named)


def all_logits(reader: Reader, prompts: Prompts, numerics: Numerics) -> Tensor:
    """Logits `[T, V]` of every position at once: for models and prompts that are small."""
    with forward.exact_products():
        *_, last = walk(reader, [prompts], numerics)
        unembedding_VD = forward.operand(reader.unembedding(), numerics)
        return forward.logits(last.values[0], reader.norm(), unembedding_VD, reader.config)

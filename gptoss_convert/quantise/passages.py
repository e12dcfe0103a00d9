"""Two residual streams on their way through a model: the tuned one's, and what rounding made of it.

Shape suffixes as in `witness.forward`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from gptoss_convert.quantise.streams import Streams
from gptoss_convert.witness import forward
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.model import LayerWeights, ModelConfig
from gptoss_convert.witness.rows import rows_by_expert
from gptoss_convert.witness.walk import Prompts, after_attention, with_operands


@dataclass(frozen=True)
class Batch:
    """Sequences that are computed together; `held_out` ones are only measured on."""

    prompts: Prompts
    held_out: bool


class Walk:
    """Both streams, between two layers."""

    def __init__(
        self,
        batches: Sequence[Batch],
        embedding_VD: Tensor,
        config: ModelConfig,
        numerics: Numerics,
        spill: Path | None,
    ) -> None:
        self.batches = batches
        self._config = config
        self._numerics = numerics
        first = [forward.embed(one.prompts.tokens, embedding_VD, numerics) for one in batches]
        self.tuned, self.rounded = Streams(first, spill), Streams(first, spill)

    def attend(self, layer: int, weights: LayerWeights) -> LayerWeights:
        """Take both streams through a layer's attention; returns its weights for the rest."""
        weights = with_operands(weights, self._numerics)
        for streams in (self.tuned, self.rounded):
            for n, batch in enumerate(self.batches):
                streams[n] = after_attention(
                    streams[n], batch.prompts.lengths, weights, self._config, layer, self._numerics
                )
        return weights

    def leave(self, weights: LayerWeights, packed: LayerWeights) -> None:
        """Take the tuned stream through a layer's experts, and the other through rounded ones."""
        for streams, held in ((self.tuned, weights), (self.rounded, packed)):
            for n in range(len(streams)):
                x_TD = streams[n]
                routing = forward.router(x_TD, held, self._config)
                normed_TD = forward.rms_norm(x_TD, held.mlp_norm, self._config.norm_eps)
                (sum_TD,) = forward.experts(
                    [normed_TD], [routing], held, self._config, self._numerics
                )
                streams[n] = sum_TD.add_(x_TD)

    def passages(self, weights: LayerWeights, held_out: bool) -> Iterator[Passage]:
        """Each batch behind attention, of those that are held out or of the others."""
        for n, batch in enumerate(self.batches):
            if batch.held_out == held_out:
                yield Passage(self.tuned[n], self.rounded[n], weights, self._config)


class Passage:
    """A batch at a layer's experts: their inputs in both streams, and where each token goes."""

    def __init__(
        self, tuned_TD: Tensor, rounded_TD: Tensor, weights: LayerWeights, config: ModelConfig
    ) -> None:
        self._missing_TD = tuned_TD - rounded_TD
        self._tuned_TD = forward.rms_norm(tuned_TD, weights.mlp_norm, config.norm_eps)
        self._rounded_TD = forward.rms_norm(rounded_TD, weights.mlp_norm, config.norm_eps)
        self._routing = forward.router(rounded_TD, weights, config)
        self._places = rows_by_expert(self._routing.chosen, config.experts)
        self._per_token = config.experts_per_token

    def met(self, expert: int) -> Met | None:
        """What an expert meets of the batch, None if nothing."""
        places = self._places[expert]
        if not len(places):
            return None
        tokens = places // self._per_token
        return Met(
            self._rounded_TD[tokens],
            self._tuned_TD[tokens],
            self._missing_TD[tokens],
            self._routing.shares.flatten()[places].square().unsqueeze(1),
        )


@dataclass(frozen=True)
class Met:
    """The tokens of a batch that an expert meets, `[T, D]`, and their weights `[T, 1]`."""

    rounded: Tensor
    """What the expert gets."""
    tuned: Tensor
    """What it would get if nothing were rounded."""
    missing: Tensor
    """What the residual stream lacks by now of the tuned one."""
    weight: Tensor
    """The squared share of the expert in each token's sum."""


def with_packed(weights: LayerWeights, gate_up: Packed, down: Packed) -> LayerWeights:
    """The layer with rounded experts; gate's rows of `gate_up` come before up's."""
    half = gate_up.scales.shape[1] // 2
    return replace(
        weights,
        gate_weight=gate_up[:, :half],
        up_weight=gate_up[:, half:],
        down_weight=down,
    )

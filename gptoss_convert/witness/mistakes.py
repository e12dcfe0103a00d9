"""Mistakes that engines make with GPT-OSS, each as the model that it turns GPT-OSS into.

A mistake changes numbers of the model or weights of each layer, so that the forward pass computes
what an engine with that mistake computes, in float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gptoss_convert.witness.forward import dense
from gptoss_convert.witness.model import LayerWeights, ModelConfig
from gptoss_convert.witness.readers import ChangedReader, Reader


def same_weights(layer: LayerWeights) -> LayerWeights:
    """The layer itself."""
    return layer


@dataclass(frozen=True)
class Mistake:
    """One mistake, made in every layer."""

    name: str
    """What goes after "answers as if"."""
    config: Callable[[ModelConfig], ModelConfig] = lambda config: config
    weights: Callable[[LayerWeights], LayerWeights] = same_weights
    square: bool = False
    """Whether it takes a model whose experts are as wide as the residual stream."""
    coarse: bool = False
    """Whether it is a rounding: two engines that make it differ by about as much as from the
    model, as each rounds other values."""

    def possible(self, config: ModelConfig) -> bool:
        """Whether a model of these numbers can suffer it, and is not already so."""
        if self.square and config.hidden != config.inter:
            return False
        return self.weights is not same_weights or self.config(config) != config


def changed(**numbers: object) -> Callable[[ModelConfig], ModelConfig]:
    """A model of other numbers."""
    return lambda config: replace(config, **numbers)  # pyright: ignore[reportArgumentType]


def window(by: int) -> Callable[[ModelConfig], ModelConfig]:
    """A window that is wider by so many tokens."""
    return lambda config: replace(config, window=config.window + by)


def zeroed(*names: str) -> Callable[[LayerWeights], LayerWeights]:
    """Layers of which these tensors are zero."""
    return lambda layer: replace(layer, **{n: torch.zeros_like(getattr(layer, n)) for n in names})


def without_sinks(layer: LayerWeights) -> LayerWeights:
    """A sink of minus infinity takes no probability."""
    return replace(layer, sinks=torch.full_like(layer.sinks, -math.inf))


def gate_for_up(layer: LayerWeights) -> LayerWeights:
    """The halves of gate_up, each taken for the other."""
    return replace(
        layer,
        gate_weight=layer.up_weight,
        up_weight=layer.gate_weight,
        gate_bias=layer.up_bias,
        up_bias=layer.gate_bias,
    )


def transposed_down(layer: LayerWeights) -> LayerWeights:
    """Each expert's down matrix, input and output exchanged."""
    down: Tensor = dense(layer.down_weight, torch.bfloat16)
    return replace(layer, down_weight=down.transpose(1, 2))


def no_windows(config: ModelConfig) -> ModelConfig:
    """Full attention in every layer."""
    return replace(config, sliding=(False,) * len(config.sliding))


def other_windows(config: ModelConfig) -> ModelConfig:
    """Full attention where the window should be, and the window elsewhere."""
    return replace(config, sliding=tuple(not windowed for windowed in config.sliding))


ATTENTION = ("q_bias", "k_bias", "v_bias", "o_bias")
EXPERTS = ("gate_bias", "up_bias", "down_bias")
FP8 = torch.float8_e4m3fn
MISTAKES: tuple[Mistake, ...] = (
    Mistake("the window were one token shorter", window(-1)),
    Mistake("the window were one token longer", window(+1)),
    Mistake("every layer attended to all tokens", no_windows),
    Mistake("the window were that of the other layers", other_windows),
    Mistake("there were no attention sinks", weights=without_sinks),
    Mistake("there were no YaRN", changed(rope_factor=1.0)),
    Mistake("YaRN's range were rounded (truncate = true)", changed(rope_truncate=True)),
    Mistake("YaRN's concentration were missing", changed(rope_concentration=1.0)),
    Mistake("rotary embedding were interleaved", changed(rope_interleaved=True)),
    Mistake("SwiGLU's clamp were missing", changed(swiglu_limit=math.inf)),
    Mistake("SwiGLU's +1 were missing", changed(swiglu_offset=0.0)),
    Mistake("the router's softmax came before its choice", changed(softmax_before_choice=True)),
    Mistake("all biases were dropped", weights=zeroed(*ATTENTION, "router_bias", *EXPERTS)),
    Mistake("the biases of attention were dropped", weights=zeroed(*ATTENTION)),
    Mistake("the biases of the routers were dropped", weights=zeroed("router_bias")),
    Mistake("the biases of the experts were dropped", weights=zeroed(*EXPERTS)),
    Mistake("gate and up were exchanged", weights=gate_for_up),
    Mistake("down were transposed", weights=transposed_down, square=True),
    Mistake("the experts' inputs were in fp8", changed(expert_inputs=FP8), coarse=True),
)
"""Known mistakes, each seen in an engine or one step from one that was."""


class MistakenReader(ChangedReader):
    """A checkpoint as an engine with a mistake takes it."""

    def __init__(self, reader: Reader, mistake: Mistake):
        super().__init__(reader, mistake.config(reader.config))
        self._mistake = mistake

    def _layer(self, index: int) -> LayerWeights:
        return self._mistake.weights(self._reader.layer(index))

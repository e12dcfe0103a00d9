"""Walk a reader through the forward pass, one layer's weights in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gptoss_convert.verify import forward
from gptoss_convert.verify.forward import LayerTrace, Numerics
from gptoss_convert.verify.readers import Reader


@dataclass(frozen=True)
class Prompts:
    """Token sequences as one row of tokens `[T]` and the lengths they are cut at."""

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


def walk(reader: Reader, prompts: Prompts, numerics: Numerics) -> Iterator[LayerTrace]:
    """The trace of each layer in turn; to be consumed within `forward.exact_products`."""
    reader.prepare(0)
    x_TD = forward.embed(prompts.tokens, reader.embedding(), numerics)
    layers = len(reader.config.sliding)
    for index in range(layers):
        weights = reader.layer(index)
        if index + 1 < layers:
            reader.prepare(index + 1)
        trace = forward.layer_forward(
            x_TD, weights, reader.config, index, prompts.lengths, numerics
        )
        x_TD = trace.output
        yield trace


def all_logits(reader: Reader, prompts: Prompts, numerics: Numerics) -> Tensor:
    """Logits `[T, V]` of every position at once: for models and prompts that are small."""
    with forward.exact_products():
        *_, last = walk(reader, prompts, numerics)
        unembedding_VD = forward.dense(reader.unembedding(), numerics.dtype)
        return forward.logits(last.output, reader.norm(), unembedding_VD, reader.config)

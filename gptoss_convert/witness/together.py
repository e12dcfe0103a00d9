"""Two readers walked side by side; what both sides would compute alike is computed once.

Equal weights and an equal residual stream give equal bits, as the forward pass is one
deterministic function. Weights are compared bit by bit on the device that computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from gptoss_convert.witness import forward
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.model import ExpertMatrices, LayerWeights, ModelConfig
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.walk import Prompts, State, layer_states

_AT_ONCE = 1 << 26
"""Weights widened at once to be compared."""
_INTEGERS = {2: torch.int16, 4: torch.int32}


def walk_both(
    source: Reader, target: Reader, batches: Sequence[Prompts], numerics: Numerics, both: bool
) -> Iterator[tuple[State, State]]:
    """The states of both after each sub-block; a batch computed once has one tensor in both.

    With `both`, everything is computed twice. To be consumed within `forward.exact_products`.
    """
    source.prepare(0)
    target.prepare(0)
    ours, theirs = (_embedded(reader, batches, numerics) for reader in (source, target))
    lengths = [batch.lengths for batch in batches]
    layers = len(source.config.sliding)
    for index in range(layers):
        weights = source.layer(index), target.layer(index)
        source.prepare(index + 1)
        target.prepare(index + 1)
        if not both:
            # Also where sides were apart: an expert that no position chose leaves no trace.
            _join(ours, theirs)
        alike = not both and same_layer((source.config, target.config), index, *weights)
        apart = [n for n in range(len(ours)) if not (alike and theirs[n] is ours[n])]
        moved = [theirs[n] for n in apart]
        theirs.clear()  # a stream lives as long as it is needed
        left = layer_states(ours, lengths, weights[0], source.config, index, numerics)
        if apart:
            cut = [lengths[n] for n in apart]
            right = layer_states(moved, cut, weights[1], target.config, index, numerics)
            for mine, other in zip(left, right, strict=True):
                yield mine, _filled(mine, other, apart)
            del right
        else:
            for mine in left:
                yield mine, mine
        theirs = _spread(ours, moved, apart)
        del weights, left  # before those of the next layer arrive


def _embedded(reader: Reader, batches: Sequence[Prompts], numerics: Numerics) -> list[Tensor]:
    embedding_VD = reader.embedding()
    return [forward.embed(batch.tokens, embedding_VD, numerics) for batch in batches]


def _join(ours: Sequence[Tensor], theirs: list[Tensor]) -> None:
    """Let equal streams be one."""
    for n, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is not b and _same_bits(a, b):
            theirs[n] = a


def _filled(mine: State, other: State, apart: Sequence[int]) -> State:
    """The target's state of all batches, of which it computed those `apart` itself."""
    return replace(
        other,
        values=_spread(mine.values, other.values, apart),
        chosen=_spread(mine.chosen, other.chosen, apart),
    )


def _spread(ours: Sequence[Tensor], theirs: Sequence[Tensor], apart: Sequence[int]) -> list[Tensor]:
    whole = [*ours]
    for n, one in zip(apart, theirs, strict=bool(theirs)):
        whole[n] = one
    return whole


def same_layer(
    configs: tuple[ModelConfig, ModelConfig], index: int, ours: LayerWeights, theirs: LayerWeights
) -> bool:
    """Whether layer `index` is one function on both sides: equal numbers, equal bits."""
    source, target = (replace(c, sliding=(c.sliding[index],)) for c in configs)
    return source == target and all(
        same_values(getattr(ours, one.name), getattr(theirs, one.name)) for one in fields(ours)
    )


def same_values(ours: ExpertMatrices, theirs: ExpertMatrices) -> bool:
    """Whether two weights hold the same numbers, to the sign of a zero, however encoded."""
    if isinstance(ours, Packed) and isinstance(theirs, Packed):
        pairs = (ours.blocks, theirs.blocks), (ours.scales, theirs.scales)
        if all(torch.equal(a, b) for a, b in pairs):
            return True
    elif isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.dtype == theirs.dtype:
        return _same_bits(ours, theirs)
    if ours.shape != theirs.shape:
        return False
    size = max(1, _AT_ONCE * ours.shape[0] // max(1, ours.shape.numel()))
    parts = (slice(start, start + size) for start in range(0, ours.shape[0], size))
    return all(_same_bits(*(forward.dense(one[rows], torch.float32) for one in (ours, theirs)))
               for rows in parts)  # fmt: skip


def _same_bits(a: Tensor, b: Tensor) -> bool:
    kind = _INTEGERS[a.dtype.itemsize]
    return torch.equal(a.view(kind), b.view(kind))

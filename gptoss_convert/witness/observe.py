"""Both checkpoints walked side by side over batches of sequences, and what each batch showed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gptoss_convert.machine.deal import deal
from gptoss_convert.machine.ranks import Ranks
from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.metrics import TokenScores
from gptoss_convert.witness.parity_report import NextTokens, SubBlockError, TokenPosition
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.tokens import TokenSequence
from gptoss_convert.witness.walk import Prompts, State, walk


@dataclass(frozen=True)
class Observed:
    """What one batch showed, on the CPU."""

    sequences: tuple[TokenSequence, ...]
    errors: tuple[SubBlockError, ...]
    """After each sub-block of each layer."""
    same_choices: tuple[int, ...]
    """For each layer, how many positions chose the same experts in both."""
    hits: tuple[Tensor, ...]
    """For each layer, how many positions chose each expert, in source and target, `[2, E]`."""
    scores: TokenScores
    next_tokens: tuple[NextTokens, ...]

    @property
    def positions(self) -> int:
        """How many positions the batch has."""
        return sum(len(one.tokens) for one in self.sequences)

    def plain(self) -> dict[str, Any]:
        """All but the sequences as JSON values; no bit is lost."""
        return {
            "errors": [astuple(error) for error in self.errors],
            "same_choices": self.same_choices,
            "hits": [layer.tolist() for layer in self.hits],
            "scores": [getattr(self.scores, one.name).tolist() for one in fields(TokenScores)],
            "next_tokens": [astuple(one) for one in self.next_tokens],
        }

    @classmethod
    def of(cls, sequences: tuple[TokenSequence, ...], plain: Mapping[str, Any]) -> Observed:
        """What another process made plain."""
        columns = [torch.tensor(column, dtype=torch.float64) for column in plain["scores"]]
        return cls(
            sequences,
            tuple(SubBlockError(*error) for error in plain["errors"]),
            tuple(plain["same_choices"]),
            tuple(torch.tensor(layer) for layer in plain["hits"]),
            TokenScores(*columns),
            tuple(
                NextTokens(name, *(tuple(map(tuple, side)) for side in sides))
                for name, *sides in plain["next_tokens"]
            ),
        )


@dataclass(frozen=True)
class Pass:
    """One forward pass of two checkpoints: the sides, how to compute, and who does."""

    source: Reader
    target: Reader
    device: torch.device
    numerics: Numerics
    positions_at_once: int
    """Bounds the memory of logits."""
    advance: Callable[[int], None]
    """Called with each layer that is done."""
    ranks: Ranks

    def observe(self, batches: Sequence[tuple[TokenSequence, ...]]) -> list[Observed]:
        """What every batch shows, in their order; each is computed by one of the ranks."""
        dealt = deal([_cost(batch) for batch in batches], self.ranks.size)
        pairs = [*zip(batches, dealt, strict=True)]
        found = self._walk([batch for batch, rank in pairs if rank == self.ranks.rank])
        if self.ranks.size == 1:
            return found
        told = [iter(one) for one in self.ranks.gather([observed.plain() for observed in found])]
        return [Observed.of(batch, next(told[rank])) for batch, rank in pairs]

    def _walk(self, batches: Sequence[tuple[TokenSequence, ...]]) -> list[Observed]:
        """Walk both models over some batches, and score every position."""
        found = [_Batch(batch, self.device) for batch in batches]
        prompts = [batch.prompts for batch in found]
        self.target.prepare(0)
        walks = zip(
            walk(self.source, prompts, self.numerics),
            walk(self.target, prompts, self.numerics),
            strict=True,
        )
        streams: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())
        for ours, theirs in walks:
            for n, batch in enumerate(found):
                batch.note(ours, theirs, n, self.source.config.experts)
            streams = ours.values, theirs.values
            if ours.block == "experts":
                self.advance(ours.layer)
        source, target = (_Head(one, self.numerics.dtype) for one in (self.source, self.target))
        return [
            batch.observed(source, target, ours, theirs, self.positions_at_once)
            for batch, ours, theirs in zip(found, *streams, strict=True)
        ]


class _Batch:
    """A batch on the device, and what was seen of it so far."""

    def __init__(self, sequences: tuple[TokenSequence, ...], device: torch.device):
        self.sequences = sequences
        self.prompts = Prompts.of([one.tokens for one in sequences], device)
        self.errors: list[SubBlockError] = []
        self.same_choices: list[int] = []
        self.hits: list[Tensor] = []

    def note(self, ours: State, theirs: State, n: int, experts: int) -> None:
        """Compare the state after one sub-block, of the batch that is the walk's `n`-th."""
        found = metrics.divergence(ours.values[n], theirs.values[n])
        where = token_position(self.sequences, found.position)
        self.errors.append(
            SubBlockError(
                layer=ours.layer,
                block=ours.block,
                error=found.worst,
                sequence=where.sequence,
                position=where.position,
                mean=found.mean,
                source_rms=found.source_rms,
                target_rms=found.target_rms,
            )
        )
        if ours.block == "router":
            chosen = ours.chosen[n], theirs.chosen[n]
            self.same_choices.append(metrics.same_choices(*chosen))
            counts = [side.flatten().bincount(minlength=experts).cpu() for side in chosen]
            self.hits.append(torch.stack(counts))

    def observed(
        self, source: _Head, target: _Head, ours_TD: Tensor, theirs_TD: Tensor, size: int
    ) -> Observed:
        """All that was seen, with scores of `size` positions at a time: never all logits."""
        parts = zip(
            ours_TD.split(size), theirs_TD.split(size), self._following().split(size), strict=True
        )
        scores = [
            metrics.score(source.logits(a), target.logits(b), next_T) for a, b, next_T in parts
        ]
        return Observed(
            self.sequences,
            tuple(self.errors),
            tuple(self.same_choices),
            tuple(self.hits),
            metrics.joined(scores),
            tuple(self._most_likely(source, ours_TD, target, theirs_TD)),
        )

    def _most_likely(
        self, source: _Head, ours_TD: Tensor, target: _Head, theirs_TD: Tensor
    ) -> Iterator[NextTokens]:
        """What both expect after the sequences that are someone's own words."""
        for one, end in zip(self.sequences, self._ends(), strict=True):
            if one.shown:
                last = slice(end, end + 1)
                yield NextTokens(one.name, source.top(ours_TD[last]), target.top(theirs_TD[last]))

    def _following(self) -> Tensor:
        """The token after each position, -1 at the end of a sequence."""
        following = self.prompts.tokens.roll(-1)
        following[self._ends()] = -1
        return following

    def _ends(self) -> list[int]:
        return (torch.tensor(self.prompts.lengths).cumsum(0) - 1).tolist()


class _Head:
    """The end of a model: final norm and unembedding, on the device once."""

    def __init__(self, reader: Reader, dtype: torch.dtype):
        self.config, self.norm = reader.config, reader.norm()
        self.unembedding = forward.dense(reader.unembedding(), dtype)

    def logits(self, x_TD: Tensor) -> Tensor:
        return forward.logits(x_TD, self.norm, self.unembedding, self.config)

    def top(self, x_1D: Tensor) -> tuple[tuple[int, float], ...]:
        """The five most likely next tokens and their probabilities."""
        best = self.logits(x_1D)[0].double().softmax(0).topk(5)
        return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _cost(batch: Sequence[TokenSequence]) -> float:
    """About what a batch costs: attention makes it the square of long sequences."""
    return sum(n + n * n / 65536 for n in (len(one.tokens) for one in batch))


def token_position(sequences: Sequence[TokenSequence], index: int) -> TokenPosition:
    """Sequence and position of the `index`-th of all positions."""
    for one in sequences:
        if index < len(one.tokens):
            return TokenPosition(one.name, index)
        index -= len(one.tokens)
    raise IndexError(index)

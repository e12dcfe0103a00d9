"""Both checkpoints walked side by side over batches of sequences, and what each batch showed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from gptoss_convert.containers.json_records import from_json, to_json
from gptoss_convert.machine.partition import balanced
from gptoss_convert.machine.ranks import Ranks
from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.metrics import TokenScores
from gptoss_convert.witness.parity_report import NextTokens, SubBlockError, TokenPosition
from gptoss_convert.witness.readers import Reader, SubBlock
from gptoss_convert.witness.together import same_values, walk_both
from gptoss_convert.witness.tokens import TokenSequence
from gptoss_convert.witness.walk import Prompts, State


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
    once: tuple[bool, ...]
    """For each layer, whether one computation served both sides."""
    scores: TokenScores
    next_tokens: tuple[NextTokens, ...]

    @property
    def positions(self) -> int:
        """How many positions the batch has."""
        return sum(len(one.tokens) for one in self.sequences)

    def plain(self) -> dict[str, Any]:
        """All but the sequences as JSON values; no bit is lost."""
        return {
            "errors": to_json(self.errors),
            "same_choices": self.same_choices,
            "hits": [layer.tolist() for layer in self.hits],
            "once": self.once,
            "scores": [getattr(self.scores, one.name).tolist() for one in fields(TokenScores)],
            "next_tokens": to_json(self.next_tokens),
        }

    @classmethod
    def of(cls, sequences: tuple[TokenSequence, ...], plain: Mapping[str, Any]) -> Observed:
        """What another process made plain."""
        columns = [torch.tensor(column, dtype=torch.float64) for column in plain["scores"]]
        return cls(
            sequences,
            from_json(tuple[SubBlockError, ...], plain["errors"]),
            tuple(plain["same_choices"]),
            tuple(torch.tensor(layer) for layer in plain["hits"]),
            tuple(plain["once"]),
            TokenScores(*columns),
            from_json(tuple[NextTokens, ...], plain["next_tokens"]),
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
    both: bool = False
    """Compute both sides throughout, also where they are equal."""

    def observe(self, batches: Sequence[tuple[TokenSequence, ...]]) -> list[Observed]:
        """What every batch shows, in their order; each is computed by one of the ranks."""
        dealt = balanced([_cost(batch) for batch in batches], self.ranks.size)
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
        streams: tuple[Sequence[Tensor], Sequence[Tensor]] = ((), ())
        for ours, theirs in walk_both(self.source, self.target, prompts, self.numerics, self.both):
            for n, batch in enumerate(found):
                batch.note(ours, theirs, n, self.source.config.experts)
            streams = ours.values, theirs.values
            if ours.block == "experts":
                self.advance(ours.layer)
        heads = self._heads()
        return [
            batch.observed(*heads, ours, theirs, self.positions_at_once)
            for batch, ours, theirs in zip(found, *streams, strict=True)
        ]

    def _heads(self) -> tuple[_Head, _Head]:
        """The ends of both models; of equal ones only the first."""
        source, target = (_Head(one, self.numerics) for one in (self.source, self.target))
        return (source, source) if not self.both and source.same_as(target) else (source, target)


class _Batch:
    """A batch on the device, and what was seen of it so far."""

    def __init__(self, sequences: tuple[TokenSequence, ...], device: torch.device):
        self.sequences = sequences
        self.prompts = Prompts.of([one.tokens for one in sequences], device)
        self.blocks: list[tuple[int, SubBlock]] = []
        self.divergences: list[Tensor] = []
        self.same_choices: list[Tensor] = []
        self.hits: list[Tensor] = []
        self.once: list[bool] = []

    def note(self, ours: State, theirs: State, n: int, experts: int) -> None:
        """Compare the state after one sub-block, of the batch that is the walk's `n`-th.

        Nothing here waits for the device, which goes on with the next sub-block.
        """
        self.blocks.append((ours.layer, ours.block))
        self.divergences.append(metrics.measured(ours.values[n], theirs.values[n]))
        if ours.block == "router":
            chosen = ours.chosen[n], theirs.chosen[n]
            self.same_choices.append(metrics.same_choices(*chosen))
            self.hits.append(torch.stack([_counts(side, experts) for side in chosen]))
            self.once.append(ours.values[n] is theirs.values[n])

    def _errors(self) -> Iterator[SubBlockError]:
        found = metrics.divergences(self.divergences)
        for (layer, block), one in zip(self.blocks, found, strict=True):
            where = token_position(self.sequences, one.position)
            yield SubBlockError(
                layer=layer,
                block=block,
                error=one.worst,
                sequence=where.sequence,
                position=where.position,
                mean=one.mean,
                source_rms=one.source_rms,
                target_rms=one.target_rms,
            )

    def observed(
        self, source: _Head, target: _Head, ours_TD: Tensor, theirs_TD: Tensor, size: int
    ) -> Observed:
        """All that was seen, with scores of `size` positions at a time: never all logits."""
        parts = zip(
            ours_TD.split(size), theirs_TD.split(size), self._following().split(size), strict=True
        )
        once = ours_TD is theirs_TD and source is target
        scores = [_scored(source, target, a, a if once else b, next_T) for a, b, next_T in parts]
        return Observed(
            self.sequences,
            tuple(self._errors()),
            tuple(torch.stack(self.same_choices).tolist()),
            tuple(torch.stack(self.hits).cpu()),
            tuple(self.once),
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

    def __init__(self, reader: Reader, numerics: Numerics):
        self.config, self.norm = reader.config, reader.norm()
        self.unembedding = forward.operand(reader.unembedding(), numerics)

    def same_as(self, other: _Head) -> bool:
        """Whether both make the same logits of the same stream."""
        weights = (self.norm, other.norm), (self.unembedding, other.unembedding)
        return self.config.norm_eps == other.config.norm_eps and all(
            same_values(ours, theirs) for ours, theirs in weights
        )

    def logits(self, x_TD: Tensor) -> Tensor:
        return forward.logits(x_TD, self.norm, self.unembedding, self.config)

    def top(self, x_1D: Tensor) -> tuple[tuple[int, float], ...]:
        """The five most likely next tokens and their probabilities."""
        best = self.logits(x_1D)[0].double().softmax(0).topk(5)
        return tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _counts(chosen_TA: Tensor, experts: int) -> Tensor:
    """How many positions chose each expert, int64 `[E]`; `bincount` would wait for the device."""
    found = chosen_TA.flatten()
    return found.new_zeros(experts).index_add_(0, found, torch.ones_like(found))


def _scored(
    source: _Head, target: _Head, ours_TD: Tensor, theirs_TD: Tensor, next_T: Tensor
) -> TokenScores:
    """The scores of some positions; of one stream before one head the logits are made once."""
    ours_TV = source.logits(ours_TD)
    alike = ours_TD is theirs_TD and source is target
    return metrics.score(ours_TV, ours_TV if alike else target.logits(theirs_TD), next_T)


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

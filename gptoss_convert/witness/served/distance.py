"""How far a server's answers are from a model's, position by position."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.served.answers import Answer
from gptoss_convert.witness.walk import Prompts, walk

REST = 1e-6
"""Probability of all other tokens from which on it counts: less is the rounding of a sum."""
_BATCH = 4096
"""Tokens that go through a layer together."""


@dataclass(frozen=True)
class Answers:
    """What a server said, as a table of P positions with up to K tokens each, on the CPU."""

    sequences: tuple[tuple[int, ...], ...]
    """Token ids of each sequence."""
    sequence: Tensor
    """Which sequence, int64 `[P]`."""
    position: Tensor
    """The last token that was seen, int64 `[P]`."""
    added: Tensor
    """Whether that token was added by the server, bool `[P]`."""
    ids: Tensor
    """Tokens with a probability, int64 `[P, K]`, 0 where there are fewer."""
    known: Tensor
    """Where there are some, bool `[P, K]`."""
    logprobs: Tensor
    """Their log probabilities, float64 `[P, K]`."""
    likeliest_told: Tensor
    """Whether the server's most likely token is among them, bool `[P]`."""
    following: Tensor
    """The column of the token that follows in the sequence, int64 `[P]`, -1 if it is in none."""

    @classmethod
    def of(cls, answers: Sequence[Answer]) -> Answers:
        """The table of some answers."""
        rows = [(n, one, said) for n, one in enumerate(answers) for said in one.predictions]
        width = max(len(said.logprobs) for _, _, said in rows)
        ids = torch.zeros(len(rows), width, dtype=torch.int64)
        known = torch.zeros(len(rows), width, dtype=torch.bool)
        logprobs = torch.zeros(len(rows), width, dtype=torch.float64)
        following = torch.full((len(rows),), -1)
        for row, (_, one, said) in enumerate(rows):
            tokens, count = list(said.logprobs), len(said.logprobs)
            ids[row, :count] = torch.tensor(tokens)
            known[row, :count] = True
            logprobs[row, :count] = torch.tensor(list(said.logprobs.values()), dtype=torch.float64)
            after = one.tokens[said.position + 1 : said.position + 2]
            if after and after[0] in said.logprobs:
                following[row] = tokens.index(after[0])
        return cls(
            tuple(one.tokens for one in answers),
            torch.tensor([n for n, _, _ in rows]),
            torch.tensor([said.position for _, _, said in rows]),
            torch.tensor([said.position >= one.prompt for _, one, said in rows]),
            ids,
            known,
            logprobs,
            torch.tensor([said.likeliest_told for _, _, said in rows]),
            following,
        )

    def __len__(self) -> int:
        return len(self.position)

    def some(self, sequences: Sequence[int]) -> Answers:
        """What was said about some of the sequences."""
        chosen = (self.sequence.unsqueeze(1) == torch.tensor(sequences)).any(1)
        place = {n: new for new, n in enumerate(sequences)}
        renamed = torch.tensor([place[int(n)] for n in self.sequence[chosen]])
        names = [one.name for one in fields(self)][2:]
        kept = tuple(self.sequences[n] for n in sequences)
        return Answers(kept, renamed, *(getattr(self, name)[chosen] for name in names))


@dataclass(frozen=True)
class Model:
    """What a model says at the same positions about the same tokens, float64 on the CPU."""

    logprobs: Tensor
    """`[P, K]`."""
    likeliest: Tensor
    """Its most likely token, int64 `[P]`."""
    margin: Tensor
    """Distance of its two largest log probabilities, `[P]`."""


def model_answers(
    reader: Reader, asked: Answers, device: torch.device, numerics: Numerics
) -> Model:
    """Walk a model over the sequences that a server was asked about."""
    batches = _batches(asked.sequences)
    prompts = [Prompts.of([asked.sequences[n] for n in batch], device) for batch in batches]
    streams: Sequence[Tensor] = ()
    found: list[tuple[Tensor, Model]] = []
    with forward.exact_products():
        for state in walk(reader, prompts, numerics):
            streams = state.values
        unembedding, norm = forward.dense(reader.unembedding(), numerics.dtype), reader.norm()
        at_once = 256 if device.type == "cpu" else 1024
        for batch, stream_TD in zip(batches, streams, strict=True):
            rows, places = _places(asked, batch)
            for some, where in zip(rows.split(at_once), places.split(at_once), strict=True):
                x_TD = stream_TD[where.to(device)]
                logits = forward.logits(x_TD, norm, unembedding, reader.config)
                found.append((some, _told(logits, asked.ids[some].to(device))))
    order = torch.cat([some for some, _ in found]).argsort()
    parts = [one for _, one in found]
    return Model(
        torch.cat([one.logprobs for one in parts])[order],
        torch.cat([one.likeliest for one in parts])[order],
        torch.cat([one.margin for one in parts])[order],
    )


def _batches(sequences: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of sequences that are computed together, the longest of them alone."""
    found: list[list[int]] = []
    room = 0
    for n, tokens in enumerate(sequences):
        if len(tokens) > room:
            found.append([])
            room = _BATCH
        found[-1].append(n)
        room -= len(tokens)
    return found


def _places(asked: Answers, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Rows of the table that are about a batch, and where their positions lie in it."""
    start, starts = 0, {}
    for n in batch:
        starts[n] = start
        start += len(asked.sequences[n])
    rows = [row for row, n in enumerate(asked.sequence.tolist()) if n in starts]
    places = [starts[int(asked.sequence[row])] + int(asked.position[row]) for row in rows]
    return torch.tensor(rows), torch.tensor(places)


def _told(logits_PV: Tensor, ids_PK: Tensor) -> Model:
    total_P1 = metrics.log_sum_exp(logits_PV).unsqueeze(1)
    top = logits_PV.topk(2, dim=1)
    return Model(
        (logits_PV.gather(1, ids_PK).double() - total_P1).cpu(),
        top.indices[:, 0].cpu(),
        (top.values[:, 0] - top.values[:, 1]).double().cpu(),
    )


@dataclass(frozen=True)
class Distance:
    """A model's answers against others, at each position; float64 `[P]`."""

    kl: Tensor
    """KL(model || others) over the tokens with a probability, all the rest as one, in nats."""
    delta: Tensor
    """|Δ log p| of the token that follows; NaN where no probability is known."""
    worst: Tensor
    """Largest |Δ log p| of the tokens that the model gives more than 1 %."""


def distance(model: Model, others: Tensor, asked: Answers) -> Distance:
    """Hold a model against log probabilities `[P, K]` of others about the tokens asked for."""
    apart = torch.where(asked.known, model.logprobs - others, 0.0)
    p = torch.where(asked.known, model.logprobs.exp(), 0.0)
    q = torch.where(asked.known, others.exp(), 0.0)
    rest_p, rest_q = (1 - p.sum(1)).clamp(min=REST), (1 - q.sum(1)).clamp(min=REST)
    kl = (p * apart).sum(1) + rest_p * (rest_p / rest_q).log()
    following = asked.following.clamp(min=0).unsqueeze(1)
    delta = apart.abs().gather(1, following).squeeze(1)
    return Distance(
        kl.clamp(min=0),  # a sum's rounding may be negative, nats are not
        torch.where(asked.following >= 0, delta, math.nan),
        torch.where(p > 0.01, apart.abs(), 0.0).amax(1),
    )


def server_likeliest(asked: Answers) -> Tensor:
    """The server's most likely token, int64 `[P]`."""
    column = torch.where(asked.known, asked.logprobs, -math.inf).argmax(1)
    return asked.ids.gather(1, column.unsqueeze(1)).squeeze(1)

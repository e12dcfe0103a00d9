"""The served level of the gate: a server's answers against the forward pass of SOURCE."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import ALONE
from gptoss_convert.verify.logits_level import memory_advice
from gptoss_convert.verify.prompts import load_tokenizer, own_sequences
from gptoss_convert.verify.result import Level, ServedOptions
from gptoss_convert.verify.sides import ahead_bytes, open_reader, tokenizer_of
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.limits import served_limits
from gptoss_convert.witness.mistakes import MISTAKES
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.node import choose_device
from gptoss_convert.witness.parity import hardware
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.served.answers import Answer, Question, UnsupportedError
from gptoss_convert.witness.served.choice import Server, connect
from gptoss_convert.witness.served.connection import Connection
from gptoss_convert.witness.served.diagnosis import Diagnosis, diagnose
from gptoss_convert.witness.served.distance import Answers, Distance, distance, model_answers
from gptoss_convert.witness.served.judge import Agreement, Range, agreement, ranges
from gptoss_convert.witness.served.prompts import (
    GO_ON,
    Asked,
    beginnings,
    digest,
    joined,
    text_of,
    text_sequences,
    token_sequences,
    whole,
)
from gptoss_convert.witness.served.words import Words
from gptoss_convert.witness.tokens import TokenSequence

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_PROBE = "The lighthouse at the end of the mole had been dark for eleven years."


def served_level(
    ours: Checkpoint, connection: Connection, options: ServedOptions, progress: Progress
) -> tuple[dict[str, Any], Level]:
    """What the server is, and what was found; see `verify_served`."""
    began = time.monotonic()
    device = choose_device(options.device, ALONE)
    reader = open_reader(ours, Fetcher(device, ahead_bytes(options.max_memory, 2)), None)
    tokenizer = load_tokenizer((ours,)) if tokenizer_of(ours) else None
    words, config = Words(tokenizer), reader.config
    probe = _probe(tokenizer, config)
    server = connect(connection, options.model, words, config.vocab, probe)
    asked, notes = _questions(server, ours, options, config, tokenizer)
    said = _ask(server, asked, progress)
    if silent := sum(not one.predictions for one in said):
        notes.append(f"{silent} of {len(asked)} questions were answered without probabilities")
    if silent == len(asked):
        raise InputError(f"{connection.address}: answered no question with probabilities")
    answers = joined(asked, said)
    with memory_advice():
        found = _Look(reader, answers, device, options, progress).found()
    level = Level(
        "served",
        found.same,
        time.monotonic() - began,
        found.text,
        found.findings,
        {
            "engine": server.engine,
            "protocol": server.protocol.name,
            "top": server.protocol.top,
            "requests": len(asked),
            "token_digest": digest(answers),
            "sequences": [_sequence(name, answer) for name, answer in answers],
            "hardware": hardware(device),
            "torch_version": torch.__version__,
            **found.numbers(),
        },
    )
    return _described(connection, server, notes), level


def _described(connection: Connection, server: Server, notes: Sequence[str]) -> dict[str, Any]:
    return {
        "path": str(connection.address),
        "format": "served",
        "model": server.model or "(not named)",
        "engine": server.engine,
        "notes": [*connection.notes, *notes],
    }


def _sequence(name: str, answer: Answer) -> dict[str, Any]:
    return {"name": name, "length": len(answer.tokens), "positions": len(answer.predictions)}


def _probe(tokenizer: Tokenizer | None, config: ModelConfig) -> Question:
    """A short question that every way of asking can put."""
    if tokenizer is None:
        return Question(tuple(range(min(8, config.vocab))), None, 2)
    tokens = tuple(tokenizer.encode(_PROBE, add_special_tokens=False).ids)
    return Question(tokens, text_of(tokenizer, tokens), 2)


def _questions(
    server: Server,
    ours: Checkpoint,
    options: ServedOptions,
    config: ModelConfig,
    tokenizer: Tokenizer | None,
) -> tuple[list[Asked], list[str]]:
    """What the server is asked, and what a person should know about it."""
    protocol = server.protocol
    tokenizer = tokenizer if protocol.takes_text else None
    if options.tokens:
        sequences = own_sequences(options.tokens, None, (ours,), config.vocab)
    elif tokenizer is not None:
        sequences = text_sequences(config, tokenizer)
    else:
        sequences = token_sequences(config)
    most = min(options.max_length or 1 << 60, (server.context or 1 << 60) - GO_ON)
    kept = [one for one in sequences if len(one.tokens) <= most]
    notes = _notes(sequences, kept, server, config)
    if not kept:
        raise UsageError(f"no sequence of at most {most} tokens to ask about")
    if protocol.scores_prompts:
        return whole(kept, options.sample, tokenizer), notes
    return beginnings(kept, config, options.sample, tokenizer), notes


def _notes(
    sequences: Sequence[TokenSequence],
    kept: Sequence[TokenSequence],
    server: Server,
    config: ModelConfig,
) -> list[str]:
    notes: list[str] = []
    if left := len(sequences) - len(kept):
        context = f"; the server's context is {server.context}" if server.context else ""
        notes.append(f"{left} of {len(sequences)} sequences were too long to ask about{context}")
    longest = max((len(one.tokens) for one in kept), default=0)
    for what, length in (
        ("the window", config.window),
        ("YaRN's original length", config.rope_original_length),
    ):
        if longest <= length:
            notes.append(f"nothing beyond {what} ({length}) was asked: mistakes there do not show")
    return notes


def _ask(server: Server, asked: Sequence[Asked], progress: Progress) -> list[Answer]:
    answers: list[Answer] = []
    with progress.phase("asking the server", 0, len(asked)) as advance:
        for one in asked:
            try:
                answers.append(server.protocol.ask(one.question))
            except UnsupportedError as error:
                raise InputError(
                    f"{error}; asked about {len(one.question.tokens)} tokens: --max-length asks "
                    "about fewer"
                ) from None
            advance(0)
    return answers


@dataclass(frozen=True)
class _Found:
    """A server held against the model."""

    ranges: tuple[Range, ...]
    agreement: Agreement
    diagnosis: Diagnosis | None
    worst: Mapping[str, Any]
    over: tuple[str, ...]

    @property
    def same(self) -> bool:
        """Within the limits, and no known mistake explains the answers better."""
        return not self.over and not (self.diagnosis and self.diagnosis.named)

    @property
    def text(self) -> str:
        """What was measured, in one line."""
        all_of_them, top = self.ranges[0], self.agreement
        clear = (
            f"the most likely token the same at {top.clear:.1%} of {top.clear_positions:,} clear "
            "positions"
        )
        return (
            f"median KL {all_of_them.server.kl_median:.1e} at {all_of_them.positions:,} positions, "
            f"{all_of_them.floor.kl_median:.1e} is bfloat16's own, {clear}"
        )

    @property
    def findings(self) -> tuple[str, ...]:
        """What is wrong, the likely cause first."""
        if self.same:
            return ()
        return (*((self.diagnosis.finding,) if self.diagnosis else ()), *self.over)

    def numbers(self) -> dict[str, Any]:
        """Everything as plain data."""
        diagnosis = asdict(self.diagnosis) if self.diagnosis else None
        return {
            "limits": asdict(served_limits()),
            "ranges": [asdict(one) for one in self.ranges],
            "agreement": asdict(self.agreement),
            "worst": dict(self.worst),
            "diagnosis": diagnosis,
        }


class _Look:
    """A server's answers, and the model that they should come from."""

    def __init__(
        self,
        reader: Reader,
        answers: Sequence[tuple[str, Answer]],
        device: torch.device,
        options: ServedOptions,
        progress: Progress,
    ):
        self.reader, self.device, self.progress = reader, device, progress
        self.names = [name for name, _ in answers]
        self.table = Answers.of([answer for _, answer in answers])
        self.every, self.limits = options.every_mistake, served_limits()

    def found(self) -> _Found:
        """Judge every range of positions, and look for the cause of what is over a limit."""
        table, config, limits = self.table, self.reader.config, self.limits
        exact, coarse = (Numerics.on(self.device, one) for one in (torch.float32, torch.bfloat16))
        with self.progress.phase("computing", 0, 2) as advance:
            model = model_answers(self.reader, table, self.device, exact)
            advance(0)
            rounded = model_answers(self.reader, table, self.device, coarse)
            advance(0)
        server = distance(model, table.logprobs, table)
        floor = distance(model, rounded.logprobs, table)
        parts, top = (
            ranges(table, server, floor, config, limits),
            agreement(table, model, floor, limits),
        )
        if not any(one.judged for one in parts):
            raise InputError(
                f"{len(table)} positions are too few to judge: {limits.least_positions} are needed"
            )
        over = (*(text for one in parts for text in one.over), *top.over)
        typical, honest = parts[0].server.kl_median, parts[0].floor.kl_median
        suspicious = typical > max(limits.suspicion * honest, limits.least_kl)
        diagnosis = None
        if over or suspicious or self.every:
            possible = sum(one.possible(config) for one in MISTAKES)
            with self.progress.phase("trying known mistakes", 0, possible) as advance:
                diagnosis = diagnose(
                    self.reader, table, model, floor, self.device, limits, lambda: advance(0)
                )
        return _Found(parts, top, diagnosis, self._worst(server), over)

    def _worst(self, server: Distance) -> dict[str, Any]:
        row = int(server.kl.argmax())
        return {
            "sequence": self.names[int(self.table.sequence[row])],
            "position": int(self.table.position[row]),
            "kl": float(server.kl[row]),
        }

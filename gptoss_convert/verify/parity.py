"""Two checkpoints through the same forward pass, side by side, and the report of their distance.

Both are walked layer by layer with one layer of each on the device. The report names the first
sub-block whose output differs by more than the limit, and the tensors that feed it.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from gptoss_convert.errors import InputError
from gptoss_convert.verify import forward, metrics
from gptoss_convert.verify.forward import LayerTrace, Numerics
from gptoss_convert.verify.limits import Limits, violations
from gptoss_convert.verify.metrics import KlRange, Summary, TokenScores
from gptoss_convert.verify.parity_report import (
    LayerReport,
    NextTokens,
    ParityReport,
    Place,
    SequenceLength,
    SubBlockError,
)
from gptoss_convert.verify.readers import Reader, SubBlock
from gptoss_convert.verify.tokens import TokenSequence, digest, extra_set
from gptoss_convert.verify.walk import Prompts, walk

COMMON_SIZES = ("hidden", "experts", "experts_per_token", "vocab")
"""Numbers two checkpoints must share before their outputs can be compared at all."""


def compare(
    source: Reader,
    target: Reader,
    sequences: Sequence[TokenSequence],
    limits: Limits,
    device: torch.device,
    numerics: Numerics | None = None,
    extra_rounds: int = 4,
    positions_at_once: int | None = None,
    advance: Callable[[int], None] = lambda layer: None,
) -> ParityReport:
    """Compare two checkpoints on `sequences`, and on random ones until every expert was chosen.

    At most `extra_rounds` rounds are added; `positions_at_once` bounds the memory of logits;
    `advance` is called with each layer that is done. Raises InputError if the two models have
    different sizes.
    """
    numerics = numerics or Numerics.on(device)
    at_once = positions_at_once or (256 if device.type == "cpu" else 1024)
    _require_common_sizes(source, target)
    rounds = [_Round(source, target, sequences, device)]
    with forward.exact_products():
        rounds[0].run(numerics, at_once, advance)
        while any(_cold(rounds, source)) and len(rounds) <= extra_rounds:
            extra = extra_set(source.config, len(rounds) - 1)
            rounds.append(_Round(source, target, extra, device))
            rounds[-1].run(numerics, at_once, advance)
    return _report(source, target, rounds, limits, numerics, device)


def _require_common_sizes(source: Reader, target: Reader) -> None:
    for name in COMMON_SIZES:
        ours, theirs = getattr(source.config, name), getattr(target.config, name)
        if ours != theirs:
            raise InputError(f"parity: {name} expects {ours} as in the source, found {theirs}")
    ours, theirs = len(source.config.sliding), len(target.config.sliding)
    if ours != theirs:
        raise InputError(f"parity: layers expects {ours} as in the source, found {theirs}")


class _Round:
    """One walk of both checkpoints over one set of sequences, and what it saw."""

    def __init__(
        self,
        source: Reader,
        target: Reader,
        sequences: Sequence[TokenSequence],
        device: torch.device,
    ):
        self.source, self.target, self.sequences = source, target, sequences
        self.prompts = Prompts.of([one.tokens for one in sequences], device)
        self.positions = self.prompts.positions().cpu()
        self.errors: list[tuple[SubBlockError, SubBlockError, SubBlockError]] = []
        self.agreement: list[float] = []
        self.hits: list[tuple[Tensor, Tensor]] = []
        self.scores: TokenScores
        self.next_tokens: tuple[NextTokens, ...] = ()

    def run(
        self, numerics: Numerics, positions_at_once: int, advance: Callable[[int], None]
    ) -> None:
        """Walk both models and score every position."""
        self.target.prepare(0)
        walks = zip(
            walk(self.source, self.prompts, numerics),
            walk(self.target, self.prompts, numerics),
            strict=True,
        )
        traces = None
        for layer, traces in enumerate(walks):
            self._observe(layer, *traces)
            advance(layer)
        assert traces is not None  # a model has at least one layer
        ours, theirs = traces
        parts = self._score(ours.output, theirs.output, positions_at_once)
        del traces, walks, ours, theirs  # only the outputs are still needed
        self.scores = metrics.joined(list(parts))

    def _observe(self, layer: int, ours: LayerTrace, theirs: LayerTrace) -> None:
        def error(block: SubBlock, a: Tensor, b: Tensor) -> SubBlockError:
            found = metrics.divergence(a, b)
            place = self.place(found.position)
            return SubBlockError(
                layer=layer,
                block=block,
                error=found.worst,
                sequence=place.sequence,
                position=place.position,
                mean=found.mean,
                source_rms=found.source_rms,
                target_rms=found.target_rms,
            )

        self.errors.append(
            (
                error("attention", ours.attention, theirs.attention),
                error("router", ours.router, theirs.router),
                error("experts", ours.output, theirs.output),
            )
        )
        self.agreement.append(metrics.routing_agreement(ours.chosen, theirs.chosen))
        experts = self.source.config.experts
        a, b = (side.chosen.flatten().bincount(minlength=experts).cpu() for side in (ours, theirs))
        self.hits.append((a, b))

    def _score(self, ours: Tensor, theirs: Tensor, size: int) -> Iterator[TokenScores]:
        """Scores of `size` positions at a time, so that logits never exist for all of them."""
        source, target = _Head(self.source, ours.dtype), _Head(self.target, theirs.dtype)
        self.next_tokens = tuple(self._most_likely(source, ours, target, theirs))
        following = self._next_tokens().split(size)
        for a, b, next_T in zip(ours.split(size), theirs.split(size), following, strict=True):
            yield metrics.score(source.logits(a), target.logits(b), next_T)

    def _most_likely(
        self, source: _Head, ours: Tensor, target: _Head, theirs: Tensor
    ) -> Iterator[NextTokens]:
        """What both expect after the sequences that are someone's own words."""
        ends = torch.tensor(self.prompts.lengths).cumsum(0) - 1
        for one, end in zip(self.sequences, ends.tolist(), strict=True):
            if one.shown:
                pair = (source.top(ours[end : end + 1]), target.top(theirs[end : end + 1]))
                yield NextTokens(one.name, *pair)

    def _next_tokens(self) -> Tensor:
        """The token after each position, -1 at the end of a sequence."""
        following = self.prompts.tokens.roll(-1)
        ends = torch.tensor(self.prompts.lengths, device=following.device).cumsum(0) - 1
        following[ends] = -1
        return following

    def place(self, index: int) -> Place:
        """Sequence and position of the `index`-th of all positions."""
        for one in self.sequences:
            if index < len(one.tokens):
                return Place(one.name, index)
            index -= len(one.tokens)
        raise IndexError(index)


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


def _hits(rounds: Sequence[_Round], layer: int) -> tuple[Tensor, Tensor]:
    """How many positions of all rounds chose each expert, in source and in target."""
    ours, theirs = zip(*(one.hits[layer] for one in rounds), strict=True)
    return torch.stack(ours).sum(0), torch.stack(theirs).sum(0)


def _cold(rounds: Sequence[_Round], source: Reader) -> list[tuple[int, ...]]:
    """For each layer the experts that no position of any round chose."""
    layers = range(len(source.config.sliding))
    return [tuple(torch.where(_hits(rounds, n)[0] == 0)[0].tolist()) for n in layers]


def _layer_reports(rounds: Sequence[_Round], source: Reader) -> Iterator[LayerReport]:
    for n, cold in enumerate(_cold(rounds, source)):
        attention, router, experts = (_over_rounds(rounds, n, block) for block in range(3))
        agreement = min(one.agreement[n] for one in rounds)
        ours, theirs = (tuple(side.tolist()) for side in _hits(rounds, n))
        yield LayerReport((attention, router, experts), agreement, cold, ours, theirs)


def _over_rounds(rounds: Sequence[_Round], layer: int, block: int) -> SubBlockError:
    """The worst position of all rounds, with means over all positions."""
    found = [one.errors[layer][block] for one in rounds]
    shares = [len(one.positions) / sum(len(r.positions) for r in rounds) for one in rounds]
    means = {
        name: sum(getattr(e, name) * share for e, share in zip(found, shares, strict=True))
        for name in ("mean", "source_rms", "target_rms")
    }
    return replace(max(found, key=lambda error: error.error), **means)


def _report(
    source: Reader,
    target: Reader,
    rounds: Sequence[_Round],
    limits: Limits,
    numerics: Numerics,
    device: torch.device,
) -> ParityReport:
    layers = tuple(_layer_reports(rounds, source))
    scores = metrics.joined([one.scores for one in rounds])
    everywhere = torch.ones(len(scores.kl), dtype=torch.bool)
    overall = metrics.summary(scores, everywhere, limits.max_delta)
    errors = [error for layer in layers for error in layer.errors]
    over = next((e for e in errors if not e.error <= limits.sub_block), None)
    exceeded = violations(
        limits,
        overall,
        [(f"layer {e.layer} {e.block}", e.error) for e in errors],
        [layer.routing_agreement for layer in layers],
    )
    return ParityReport(
        passed=not exceeded,
        violations=exceeded,
        limits=limits,
        dtype=str(numerics.dtype).removeprefix("torch."),
        hardware=_hardware(device),
        torch_version=torch.__version__,
        token_digest=digest([one for r in rounds for one in r.sequences]),
        config_differences=_config_differences(source, target),
        overall=overall,
        buckets=dict(_buckets(rounds, scores, source, limits)),
        window=source.config.window,
        original_length=source.config.rope_original_length,
        kl_by_position=_kl_by_position(rounds, scores, source),
        sequences=tuple(
            SequenceLength(one.name, len(one.tokens)) for r in rounds for one in r.sequences
        ),
        worst_kl=_place(rounds, int(scores.kl.argmax())),
        worst_delta=_place(rounds, int(scores.max_delta.argmax())),
        layers=layers,
        first_over=over,
        source_feeding=source.feeding(over.layer, over.block) if over else (),
        target_feeding=target.feeding(over.layer, over.block) if over else (),
        next_tokens=rounds[0].next_tokens,
    )


def _buckets(
    rounds: Sequence[_Round], scores: TokenScores, source: Reader, limits: Limits
) -> Iterator[tuple[str, Summary]]:
    """Summaries within the window, within YaRN's original length, and beyond; positions from 0."""
    positions = torch.cat([one.positions for one in rounds])
    window, original = source.config.window, source.config.rope_original_length
    for label, chosen in (
        (f"<{window}", positions < window),
        (f"{window}-{original - 1}", (positions >= window) & (positions < original)),
        (f">={original}", positions >= original),
    ):
        if chosen.any():
            yield label, metrics.summary(scores, chosen, limits.max_delta)


def _kl_by_position(
    rounds: Sequence[_Round], scores: TokenScores, source: Reader
) -> tuple[KlRange, ...]:
    positions = torch.cat([one.positions for one in rounds])
    last = int(positions.max())
    octaves = {round(2 ** (n / 2)) for n in range(2 * last.bit_length())}
    marks = {source.config.window, source.config.rope_original_length}
    borders = sorted(n for n in {0} | octaves | marks if n <= last)
    return metrics.kl_ranges(scores.kl, positions, borders)


def _place(rounds: Sequence[_Round], index: int) -> Place:
    for one in rounds:
        if index < len(one.positions):
            return one.place(index)
        index -= len(one.positions)
    raise IndexError(index)


def _config_differences(source: Reader, target: Reader) -> tuple[str, ...]:
    pairs = (
        (f.name, getattr(source.config, f.name), getattr(target.config, f.name))
        for f in fields(source.config)
    )
    return tuple(f"{name}: source {a}, target {b}" for name, a, b in pairs if a != b)


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()

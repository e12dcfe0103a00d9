"""Two checkpoints through the same forward pass, side by side, and the report of their distance.

Both are walked layer by layer with one layer of each on the device. The report names the first
sub-block whose output differs by more than the limit, and the tensors that feed it.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace

import torch
from torch import Tensor

from gptoss_convert.errors import InputError
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.limits import Limits, violations
from gptoss_convert.witness.metrics import KlRange, Summary, TokenScores
from gptoss_convert.witness.observe import Observed, Pass, token_position
from gptoss_convert.witness.parity_report import (
    LayerReport,
    ParityReport,
    SequenceLength,
    SubBlockError,
)
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.tokens import TokenSequence, batches, digest, extra_set

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
    ranks: Ranks = ALONE,
    both: bool = False,
) -> ParityReport:
    """Compare two checkpoints on `sequences`, and on random ones until every expert was chosen.

    At most `extra_rounds` rounds are added; `positions_at_once` bounds the memory of logits;
    `advance` is called with each layer that is done; `both` computes both sides also where they
    are equal. All of `ranks` compute, and have the same report. Raises InputError if the two
    models have different sizes.
    """
    numerics = numerics or Numerics.on(device)
    at_once = positions_at_once or (256 if device.type == "cpu" else 1024)
    _require_common_sizes(source, target)
    walked = Pass(source, target, device, numerics, at_once, advance, ranks, both)
    with forward.exact_products():
        observed = walked.observe(batches(sequences))
        for turn in range(extra_rounds):
            if not any(_cold(ours) for ours, _ in _hits(observed)):
                break
            observed += walked.observe(batches(extra_set(source.config, turn)))
    return _report(source, target, observed, limits, numerics, device)


def _require_common_sizes(source: Reader, target: Reader) -> None:
    for name in COMMON_SIZES:
        ours, theirs = getattr(source.config, name), getattr(target.config, name)
        if ours != theirs:
            raise InputError(f"parity: {name} expects {ours} as in the source, found {theirs}")
    ours, theirs = len(source.config.sliding), len(target.config.sliding)
    if ours != theirs:
        raise InputError(f"parity: layers expects {ours} as in the source, found {theirs}")


def _hits(observed: Sequence[Observed]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """For each layer how many positions chose each expert, in source and in target."""
    layers = zip(*(one.hits for one in observed), strict=True)
    summed = (torch.stack(hits).sum(0).tolist() for hits in layers)
    return [(tuple(ours), tuple(theirs)) for ours, theirs in summed]


def _cold(hits: Sequence[int]) -> tuple[int, ...]:
    return tuple(expert for expert, count in enumerate(hits) if not count)


def _layer_reports(observed: Sequence[Observed]) -> Iterator[LayerReport]:
    positions = len(_positions(observed))
    for n, (ours, theirs) in enumerate(_hits(observed)):
        attention, router, experts = (_overall(observed, 3 * n + block) for block in range(3))
        same = sum(one.same_choices[n] for one in observed)
        once = all(one.once[n] for one in observed)
        yield LayerReport(
            (attention, router, experts), same / positions, _cold(ours), ours, theirs, once
        )


def _overall(observed: Sequence[Observed], index: int) -> SubBlockError:
    """The worst position of all batches, with means over all positions."""
    found = [one.errors[index] for one in observed]
    lengths = [one.positions for one in observed]

    def mean(name: str) -> float:
        pairs = zip(found, lengths, strict=True)
        return math.fsum(getattr(e, name) * n for e, n in pairs) / sum(lengths)

    means = {name: mean(name) for name in ("mean", "source_rms", "target_rms")}
    return replace(max(found, key=lambda error: error.error), **means)


def _positions(observed: Sequence[Observed]) -> Tensor:
    """The position of each token within its own sequence, int64 `[T]`."""
    lengths = [len(one.tokens) for batch in observed for one in batch.sequences]
    return torch.cat([torch.arange(length) for length in lengths])


def _report(
    source: Reader,
    target: Reader,
    observed: Sequence[Observed],
    limits: Limits,
    numerics: Numerics,
    device: torch.device,
) -> ParityReport:
    layers = tuple(_layer_reports(observed))
    scores, positions = metrics.joined([one.scores for one in observed]), _positions(observed)
    sequences = [one for batch in observed for one in batch.sequences]
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
        hardware=hardware(device),
        torch_version=torch.__version__,
        token_digest=digest(sequences),
        config_differences=_config_differences(source, target),
        overall=overall,
        buckets=dict(_buckets(positions, scores, source, limits)),
        window=source.config.window,
        original_length=source.config.rope_original_length,
        kl_by_position=_kl_by_position(positions, scores, source),
        sequences=tuple(SequenceLength(one.name, len(one.tokens)) for one in sequences),
        worst_kl=token_position(sequences, int(scores.kl.argmax())),
        worst_delta=token_position(sequences, int(scores.max_delta.argmax())),
        layers=layers,
        first_over=over,
        source_feeding=source.feeding(over.layer, over.block) if over else (),
        target_feeding=target.feeding(over.layer, over.block) if over else (),
        next_tokens=tuple(shown for batch in observed for shown in batch.next_tokens),
    )


def _buckets(
    positions: Tensor, scores: TokenScores, source: Reader, limits: Limits
) -> Iterator[tuple[str, Summary]]:
    """Summaries within the window, within YaRN's original length, and beyond; positions from 0."""
    window, original = source.config.window, source.config.rope_original_length
    for label, chosen in (
        (f"<{window}", positions < window),
        (f"{window}-{original - 1}", (positions >= window) & (positions < original)),
        (f">={original}", positions >= original),
    ):
        if chosen.any():
            yield label, metrics.summary(scores, chosen, limits.max_delta)


def _kl_by_position(positions: Tensor, scores: TokenScores, source: Reader) -> tuple[KlRange, ...]:
    last = int(positions.max())
    octaves = {round(2 ** (n / 2)) for n in range(2 * last.bit_length())}
    marks = {source.config.window, source.config.rope_original_length}
    borders = sorted(n for n in {0} | octaves | marks if n <= last)
    return metrics.kl_ranges(scores.kl, positions, borders)


def _config_differences(source: Reader, target: Reader) -> tuple[str, ...]:
    pairs = (
        (f.name, getattr(source.config, f.name), getattr(target.config, f.name))
        for f in fields(source.config)
    )
    return tuple(f"{name}: source {a}, target {b}" for name, a, b in pairs if a != b)


def hardware(device: torch.device) -> str:
    """What computes, by the name its maker gave it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()

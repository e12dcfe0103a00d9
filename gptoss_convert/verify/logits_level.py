"""The logits level of the gate: two checkpoints through one forward pass, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch

from gptoss_convert.errors import ResourceError, UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.verify.prompts import own_sequences, shown_tokens
from gptoss_convert.verify.result import Level, VerifyOptions
from gptoss_convert.verify.sides import open_reader
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.limits import load_limits
from gptoss_convert.witness.node import NewFetcher, choose_device, sharing
from gptoss_convert.witness.parity import compare, hardware
from gptoss_convert.witness.parity_report import ParityReport
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.tokens import TokenSequence, token_set

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def logits_level(
    ours: Checkpoint,
    theirs: Checkpoint,
    options: VerifyOptions,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Level:
    """Both through one forward pass, side by side, by all of `ranks`.

    Raises ResourceError if a GPU is too small, UsageError where ranks compute on other devices.
    """
    began = time.monotonic()
    device = choose_device(options.device, ranks)
    _require_equal_devices(device, ranks)
    with memory_advice(), sharing(ranks, device) as new_fetcher:
        report = _compare(ours, theirs, options, device, progress, new_fetcher, ranks)
    peaks = ranks.gather(_peak(device))
    numbers = {**asdict(report), "gpu_memory_bytes": max(peaks), "gpu_memory_by_rank": peaks}
    numbers["next_tokens_text"] = shown_tokens(report.next_tokens, ours, theirs)
    seconds = time.monotonic() - began
    return Level("logits", report.passed, seconds, _agreement(report), _findings(report), numbers)


def _compare(
    ours: Checkpoint,
    theirs: Checkpoint,
    options: VerifyOptions,
    device: torch.device,
    progress: Progress,
    new_fetcher: NewFetcher,
    ranks: Ranks,
) -> ParityReport:
    source, target = (
        open_reader(side, new_fetcher(options.max_memory // 2), options.layers)
        for side in (ours, theirs)
    )
    layers = len(source.config.sliding)
    nbytes = sum(chunk.nbytes for side in (ours, theirs) for chunk in side.chunks)
    with progress.phase("logits", nbytes, layers) as advance:
        return compare(
            source,
            target,
            _sequences(source, (ours, theirs), options, device),
            load_limits(options.limits),
            device,
            Numerics.on(device, DTYPES[options.dtype]),
            advance=lambda layer: advance(nbytes // layers),
            ranks=ranks,
            both=options.both,
        )


def _require_equal_devices(device: torch.device, ranks: Ranks) -> None:
    """Other devices round otherwise: what is equal would seem to depend on who computed it."""
    found = ranks.gather(hardware(device))
    other = next((rank for rank, name in enumerate(found) if name != found[0]), None)
    if other is not None:
        raise UsageError(
            f"rank 0 computes on {found[0]}, rank {other} on {found[other]}: all must have the "
            "same device"
        )


def _sequences(
    source: Reader, sides: Sequence[Checkpoint], options: VerifyOptions, device: torch.device
) -> tuple[TokenSequence, ...]:
    own = own_sequences(options.tokens, options.prompt, sides, source.config.vocab)
    if options.tokens:
        return own
    config, on_gpu = source.config, device.type == "cuda"
    usual = min(config.rope_original_length * (8 if on_gpu else 1), 32768 if on_gpu else 4096)
    longest = options.max_length or usual
    positions = 65536 if on_gpu else 0
    return own + token_set(config, longest, positions, options.sample)


@contextmanager
def memory_advice() -> Iterator[None]:
    """Turn the GPU's out-of-memory into a ResourceError that says what to do."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info()
        raise ResourceError(
            f"GPU memory: {free / 1e9:.1f} of {total / 1e9:.1f} GB free, not enough; shorten the "
            "prompts with --max-length or --sample, or use --device cpu"
        ) from error


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _agreement(report: ParityReport) -> str:
    cold = sum(len(layer.cold_experts) for layer in report.layers)
    missed = f", {cold} experts never chosen" if cold else ", every expert of every layer chosen"
    overall = report.overall
    once = sum(layer.computed_once for layer in report.layers)
    shared = f", {once} of {len(report.layers)} layers equal and computed once" if once else ""
    return (
        f"max |Δlogit| {overall.max_delta:g} at {overall.positions:,} positions "
        f"on {report.hardware}{missed}{shared}"
    )


def _findings(report: ParityReport) -> tuple[str, ...]:
    """The first sub-block over the limit with the tensors that feed it, then each limit."""
    found = list(report.violations)
    if over := report.first_over:
        fed = ", ".join(report.target_feeding)
        found.insert(
            0,
            f"layer {over.layer} {over.block}: relative error {over.error:.3g} at position "
            f"{over.position} of {over.sequence}; fed by {fed}",
        )
    elif found:
        found.insert(0, f"after the last layer: {found.pop(0)}; fed by the final norm, unembedding")
    return tuple(found)

"""The logits level of the gate: two checkpoints through one forward pass, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace

import torch

from gptoss_convert.errors import ResourceError, UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.verify.prompts import own_sequences, shown_tokens
from gptoss_convert.verify.result import LOSSY, Level, VerifyOptions
from gptoss_convert.verify.sides import ahead_bytes, open_reader
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.limits import Limits, load_limits, lossy_share
from gptoss_convert.witness.node import NewFetcher, choose_device, sharing
from gptoss_convert.witness.parity import compare, hardware
from gptoss_convert.witness.parity_report import ParityReport
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.tokens import TokenSequence, passages, token_set
from gptoss_convert.witness.update import UpdateReport, update_kept

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
        update = _update(ours, theirs, options, device, progress)
    peaks = ranks.gather(_peak(device))
    numbers = {**asdict(report), "gpu_memory_bytes": max(peaks), "gpu_memory_by_rank": peaks}
    numbers["next_tokens_text"] = shown_tokens(report.next_tokens, ours, theirs)
    numbers["update"] = asdict(update) if update else None
    findings = (*_findings(report), *_update_findings(update, options))
    text = _agreement(report) if update is None else _kept(update)
    return Level("logits", not findings, time.monotonic() - began, text, findings, numbers)


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
        open_reader(side, new_fetcher(ahead_bytes(options.max_memory, 2)), options.layers)
        for side in (ours, theirs)
    )
    layers = len(source.config.sliding)
    nbytes = sum(chunk.nbytes for side in (ours, theirs) for chunk in side.chunks)
    with progress.phase("logits", nbytes, layers) as advance:
        return compare(
            source,
            target,
            _sequences(source, (ours, theirs), options, device),
            _limits(options),
            device,
            Numerics.on(device, DTYPES[options.dtype]),
            advance=lambda layer: advance(nbytes // layers),
            ranks=ranks,
            both=options.both,
            **({"extra_rounds": 0} if options.limits == LOSSY else {}),
        )


def _limits(options: VerifyOptions) -> Limits:
    """The limits, with the user's own in its place; the base decides where it is named."""
    limits = load_limits(options.limits)
    if options.limits != LOSSY:
        for name, value in (("--base", options.base), ("--max-kl", options.max_kl)):
            if value is not None:
                raise UsageError(f"{name} goes with --limits lossy")
        return limits
    if options.max_kl is None and options.base is not None:
        return replace(limits, mean_kl=limits.max_kl)
    return limits if options.max_kl is None else replace(limits, mean_kl=options.max_kl)


def _update(
    ours: Checkpoint,
    theirs: Checkpoint,
    options: VerifyOptions,
    device: torch.device,
    progress: Progress,
) -> UpdateReport | None:
    """What is left of the update, where the base is named; every rank computes it."""
    if options.base is None:
        return None
    base = open_checkpoint(options.base)
    if base.config.numbers != ours.config.numbers:
        raise UsageError(f"--base {options.base}: another size of model than {ours.place}")
    readers = [
        open_reader(side, Fetcher(device, ahead_bytes(options.max_memory, 3)), options.layers)
        for side in (ours, theirs, base)
    ]
    layers = len(readers[0].config.sliding)
    nbytes = sum(chunk.nbytes for side in (ours, theirs, base) for chunk in side.chunks)
    with progress.phase("the update", nbytes, layers) as advance:
        return update_kept(
            readers[0],
            readers[1],
            readers[2],
            _sequences(readers[0], (ours, theirs, base), options, device),
            device,
            Numerics.on(device, DTYPES[options.dtype]),
            advance=lambda layer: advance(nbytes // layers),
        )


def _update_findings(update: UpdateReport | None, options: VerifyOptions) -> tuple[str, ...]:
    if update is None or options.max_kl is not None:
        return ()
    limit = lossy_share() * update.kl_base
    if update.kl <= limit:
        return ()
    return (
        f"the update is not kept: mean KL from SOURCE to TARGET expects at most {limit:.3g}, "
        f"{lossy_share():.0%} of {update.kl_base:.3g} from base to SOURCE, found {update.kl:.3g}",
    )


def _kept(update: UpdateReport) -> str:
    kept = [part for layer in update.layers for part in layer.kept if part is not None]
    share = f"{sum(kept) / len(kept):.2f}" if kept else "none"
    return (
        f"mean KL {update.kl:.3g} from SOURCE to TARGET, {update.kl_base:.3g} from base to SOURCE, "
        f"at {update.positions:,} positions; update kept by the experts {share}"
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
    if options.limits == LOSSY:
        # Text alone, and what `--lossy calibrated --calibrate auto` holds out.
        return own + passages(source.config.vocab)[7::8]
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

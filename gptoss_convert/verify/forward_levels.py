"""The logits level of the gate: two checkpoints through one forward pass, side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch

from gptoss_convert.checkpoint import Checkpoint
from gptoss_convert.errors import ResourceError, UsageError
from gptoss_convert.progress import Progress
from gptoss_convert.verify.forward import Numerics
from gptoss_convert.verify.gate import Level, Options
from gptoss_convert.verify.limits import load_limits
from gptoss_convert.verify.parity import compare
from gptoss_convert.verify.parity_report import ParityReport
from gptoss_convert.verify.prompts import own_sequences, shown_tokens
from gptoss_convert.verify.readers import Reader
from gptoss_convert.verify.sides import open_reader
from gptoss_convert.verify.tokens import TokenSequence, token_set

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}


def logits_level(
    ours: Checkpoint, theirs: Checkpoint, options: Options, progress: Progress
) -> Level:
    """Both through one forward pass, side by side; raises ResourceError if a GPU is too small."""
    began = time.monotonic()
    limits, device = load_limits(options.limits), choose_device(options.device)
    source, target = _readers(ours, theirs, options, device)
    sequences = _sequences(source, (ours, theirs), options, device)
    layers = len(source.config.sliding)
    nbytes = sum(chunk.nbytes for side in (ours, theirs) for chunk in side.chunks)
    with memory_advice(), progress.phase("logits", nbytes, layers) as advance:
        numerics = Numerics.on(device, DTYPES[options.dtype])
        report = compare(
            source,
            target,
            sequences,
            limits,
            device,
            numerics,
            advance=lambda layer: advance(nbytes // layers),
        )
    numbers = {**asdict(report), "gpu_memory_bytes": _peak(device)}
    numbers["next_tokens_text"] = shown_tokens(report.next_tokens, ours, theirs)
    seconds = time.monotonic() - began
    return Level("logits", report.passed, seconds, _agreement(report), _findings(report), numbers)


def choose_device(wish: str) -> torch.device:
    """The device of a wish: `auto` takes a GPU if there is one."""
    found = torch.cuda.is_available()
    if wish == "cuda" and not found:
        raise UsageError("--device cuda: no CUDA device found; choose cpu")
    return torch.device("cuda" if wish == "cuda" or (wish == "auto" and found) else "cpu")


def _readers(
    ours: Checkpoint, theirs: Checkpoint, options: Options, device: torch.device
) -> tuple[Reader, Reader]:
    ahead = options.max_memory // 2
    return (
        open_reader(ours, device, options.layers, ahead),
        open_reader(theirs, device, options.layers, ahead),
    )


def _sequences(
    source: Reader, sides: Sequence[Checkpoint], options: Options, device: torch.device
) -> tuple[TokenSequence, ...]:
    own = own_sequences(options.tokens, options.prompt, sides, source.config.vocab)
    if options.tokens:
        return own
    config, on_gpu = source.config, device.type == "cuda"
    longest = options.max_length or config.rope_original_length * (8 if on_gpu else 1)
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
    return (
        f"max |Δlogit| {overall.max_delta:g} at {overall.positions:,} positions "
        f"on {report.hardware}{missed}"
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

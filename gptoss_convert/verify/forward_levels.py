"""The levels of the gate that compute with the weights: logits, and the ecosystems' own models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

import torch
from torch import Tensor

from gptoss_convert.checkpoint import Checkpoint
from gptoss_convert.errors import ResourceError, UsageError
from gptoss_convert.progress import Progress
from gptoss_convert.verify.forward import Numerics
from gptoss_convert.verify.gate import Level, Options
from gptoss_convert.verify.limits import load_limits
from gptoss_convert.verify.oracles import oracle_logits
from gptoss_convert.verify.parity import compare
from gptoss_convert.verify.parity_report import ParityReport
from gptoss_convert.verify.prompts import own_sequences, shown_tokens
from gptoss_convert.verify.readers import Reader
from gptoss_convert.verify.sides import open_reader
from gptoss_convert.verify.tokens import TokenSequence, token_set
from gptoss_convert.verify.walk import Prompts, all_logits

FLOOR_SPREAD = 1.5
"""Standard deviation of the logits that the floor of two implementations was measured at."""
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
    with _memory_advice(), progress.phase("logits", nbytes, layers) as advance:
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
def _memory_advice() -> Iterator[None]:
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


def oracle_level(
    ours: Checkpoint, theirs: Checkpoint, options: Options, progress: Progress
) -> Level:
    """Each side's own model code against the shared forward pass, within its measured floor."""
    began = time.monotonic()
    device, floor = choose_device(options.device), load_limits("float32")
    numbers: dict[str, float | str] = {}
    findings: list[str] = []
    for name, side in (("SOURCE", ours), ("TARGET", theirs)):
        with _memory_advice(), progress.phase(f"oracle of {name}", 0, 1):
            reader = open_reader(side, device, options.layers, options.max_memory // 2)
            sequences = _oracle_tokens(reader, options)
            found = oracle_logits(side, reader.config, sequences, device)
            if isinstance(found, str):
                numbers[name] = found
                continue
            delta = _distance(reader, sequences, found, device)
            spread = float(torch.cat([one.float().std().view(1) for one in found]).max())
        numbers[name] = delta
        limit = floor.max_delta * max(1.0, spread / FLOOR_SPREAD)
        if not delta <= limit:
            findings.append(
                f"{side.label} {side.root}: its own model code gives other logits: max |Δlogit| "
                f"expects at most {limit:.2g}, found {delta:.2g}"
            )
    told = ", ".join(
        f"{name} {value if isinstance(value, str) else f'max |Δlogit| {value:.2g}'}"
        for name, value in numbers.items()
    )
    seconds = time.monotonic() - began
    text = f"own model code against the shared forward pass: {told}"
    return Level("oracle", not findings, seconds, text, tuple(findings), numbers)


def _oracle_tokens(reader: Reader, options: Options) -> list[list[int]]:
    sample = options.sample if options.sample is not None else 1
    chosen = token_set(reader.config, options.max_length or 1, 0, sample)
    return [list(one.tokens) for one in chosen]


def _distance(
    reader: Reader, sequences: list[list[int]], found: list[Tensor], device: torch.device
) -> float:
    """Largest |Δlogit| between the oracle and the shared forward pass."""
    worst = torch.zeros((), device=device)
    for tokens, theirs in zip(sequences, found, strict=True):
        ours = all_logits(reader, Prompts.of([tokens], device), Numerics.on(device))
        worst = torch.maximum(worst, (ours - theirs.to(device)).abs().max())
    return float(worst)

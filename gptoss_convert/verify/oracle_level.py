"""The oracle level of the gate: each side's own model code against the shared forward pass."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from gptoss_convert.errors import GptossError, UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.verify.logits_level import memory_advice
from gptoss_convert.verify.result import Level, VerifyOptions
from gptoss_convert.verify.sides import ahead_bytes, given, open_reader
from gptoss_convert.witness import forward
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.first_calls import settle_kernels
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.limits import OracleLimits, oracle_limits
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.node import choose_device
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.tokens import token_set
from gptoss_convert.witness.walk import Prompts, walk
from gptoss_convert.witness.witness import witness_of


def oracle_level(
    ours: Checkpoint,
    theirs: Checkpoint,
    options: VerifyOptions,
    progress: Progress,
    ranks: Ranks = ALONE,
) -> Level:
    """Each side's own model code against the shared forward pass, within its measured floor."""
    began = time.monotonic()
    device = choose_device(options.device, ranks)
    # Of an adapter there is no code of the base's own: the base alone is held against it.
    sides = {"SOURCE": replace(ours, adapter=None), "TARGET": theirs}
    mine: dict[str, Any] = {}
    for n, (name, side) in enumerate(sides.items()):
        if n % ranks.size == ranks.rank:
            with memory_advice(), progress.phase(f"oracle of {name}", 0, 1):
                one = _agreement(side, options, device)
            mine[name] = one if isinstance(one, str) else asdict(one)
    told = {name: one for part in ranks.gather(mine) for name, one in part.items()}
    found = {name: one if isinstance(one, str) else Agreement(**one) for name, one in told.items()}
    findings = [
        f"{sides[name].label} {sides[name].root}: {problem}"
        for name, one in found.items()
        if (problem := _problem(one))
    ]
    agreements = ", ".join(f"{name}{_library(sides[name])} {one}" for name, one in found.items())
    text = f"own model code against the shared forward pass: {agreements}"
    seconds = time.monotonic() - began
    return Level("oracle", not findings, seconds, text, tuple(findings), told)


def _library(side: Checkpoint) -> str:
    """Whose model was asked, and its version, in brackets."""
    library = witness_of(side.format).library
    return f" ({library} {version(library)})" if library else ""


_REFUSED = "its own model code refuses it: "


def _problem(one: Agreement | str) -> str | None:
    """What is wrong with a side, in words: other logits, or none where there ought to be some."""
    if isinstance(one, str):
        return one if one.startswith(_REFUSED) else None
    return one.finding


def oracle_logits(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    device: torch.device,
) -> list[Tensor] | str:
    """What the checkpoint's own ecosystem computes, or why it cannot, in words.

    Raises UsageError if its library is not installed.
    """
    settle_kernels()
    try:
        oracle = witness_of(checkpoint.format).oracle
        return oracle(given(checkpoint), config, sequences, device)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--level oracle of {checkpoint.label} needs {error.name}: "
            "pip install 'gptoss-convert[oracles]'"
        ) from error
    except (GptossError, MemoryError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        # Whatever its libraries raise: that it does not load there is a finding, and no bug here.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{_REFUSED}{type(error).__name__}: {' '.join(lines)[:300]}"


@dataclass(frozen=True)
class Agreement:
    """How far one side's own model is from the shared forward pass, over all its sequences."""

    positions: int
    settled: int
    """Positions with no near tie of a router at them or before them: those that are judged."""
    max_delta: float
    """Largest |Δlogit| of the settled positions; NaN if there is none."""
    max_delta_anywhere: float
    """The same of all positions, where a flipped tie may have sent tokens to other experts."""
    median_delta: float
    limit: float

    @property
    def finding(self) -> str | None:
        """What is wrong, in words."""
        if not self.settled:
            return "no position can be judged: a router's near tie at the start of every sequence"
        if not self.max_delta <= self.limit:
            return (
                "its own model code gives other logits: max |Δlogit| "
                f"expects at most {self.limit:.2g}, found {self.max_delta:.2g}"
            )
        return None

    def __str__(self) -> str:
        text = f"max |Δlogit| {self.max_delta:.2g} at {self.settled:,}"
        if self.settled == self.positions:
            return f"{text} positions"
        return (
            f"{text} of {self.positions:,} positions "
            f"(the others follow a near tie of a router: {self.max_delta_anywhere:.2g})"
        )


def _agreement(side: Checkpoint, options: VerifyOptions, device: torch.device) -> Agreement | str:
    """Run one side's own model; text says why there is none to run."""
    # Its own model code rounds nothing, whatever --cast says.
    side = replace(side, cast=False)
    reader = open_reader(side, Fetcher(device, ahead_bytes(options.max_memory, 2)), options.layers)
    sequences = _tokens(reader, options)
    theirs = oracle_logits(side, reader.config, sequences, device)
    if isinstance(theirs, str):
        return theirs
    limits = oracle_limits(reader.config.hidden)
    spread = max(float(one.float().std()) for one in theirs)
    pairs = zip(sequences, theirs, strict=True)
    return judge([distances(reader, tokens, one, device) for tokens, one in pairs], limits, spread)


def judge(found: Sequence[Distances], limits: OracleLimits, spread: float) -> Agreement:
    """Sum up sequences whose logits have a standard deviation of `spread`.

    Attention is causal: until the first near tie of a sequence nothing after it can matter.
    """
    delta = torch.cat([one.delta for one in found])
    settled = torch.cat([one.margin.cummin(0).values > limits.tie for one in found])
    judged = delta[settled]
    return Agreement(
        positions=len(delta),
        settled=len(judged),
        max_delta=float(judged.max()) if len(judged) else math.nan,
        max_delta_anywhere=float(delta.max()),
        median_delta=float(delta.median()),
        limit=limits.largest(spread),
    )


def _tokens(reader: Reader, options: VerifyOptions) -> list[list[int]]:
    sample = options.sample if options.sample is not None else 1
    chosen = token_set(reader.config, options.max_length or 1, 0, sample)
    return [list(one.tokens) for one in chosen]


@dataclass(frozen=True)
class Distances:
    """The shared forward pass against an oracle, by position; float32 `[T]` on the CPU."""

    delta: Tensor
    """Largest |Δlogit|."""
    margin: Tensor
    """Smallest distance, in any layer, of the last router logit that is chosen to the next."""


def _margin(router_TE: Tensor, chosen: int) -> Tensor:
    """From the last router logit that is chosen to the next, `[T]`; infinite where all are."""
    if chosen == router_TE.shape[1]:
        return torch.full_like(router_TE[:, 0], math.inf)
    top_TA = router_TE.topk(chosen + 1, dim=-1).values
    return top_TA[:, -2] - top_TA[:, -1]


def distances(
    reader: Reader, tokens: Sequence[int], oracle_TV: Tensor, device: torch.device
) -> Distances:
    """Run one sequence through the shared forward pass, against the oracle's logits of it."""
    numerics, prompts = Numerics.on(device), Prompts.of([tokens], device)
    margins: list[Tensor] = []
    output_TD = torch.empty(0)
    with forward.exact_products():
        for state in walk(reader, [prompts], numerics):
            if state.block == "router":
                margins.append(_margin(state.values[0], reader.config.experts_per_token))
            else:
                output_TD = state.values[0]
        unembedding_VD, norm_D = forward.operand(reader.unembedding(), numerics), reader.norm()
        deltas = [
            (forward.logits(x, norm_D, unembedding_VD, reader.config) - y.to(device)).abs().amax(1)
            for x, y in zip(output_TD.split(256), oracle_TV.split(256), strict=True)
        ]
    return Distances(torch.cat(deltas).cpu(), torch.stack(margins).amin(0).cpu())

"""What a comparison of two checkpoints found, as plain frozen values that turn into JSON."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_convert.witness.limits import Limits
from gptoss_convert.witness.metrics import KlRange, Summary
from gptoss_convert.witness.readers import SubBlock


@dataclass(frozen=True)
class SubBlockError:
    """How far a sub-block's output is apart: the worst position's relative error, and where."""

    layer: int
    block: SubBlock
    error: float
    sequence: str
    position: int
    mean: float
    """The mean relative error of all positions."""
    source_rms: float
    """Root mean square of the source's elements, on average over positions."""
    target_rms: float


@dataclass(frozen=True)
class LayerReport:
    """What was seen of one layer, over all positions."""

    errors: tuple[SubBlockError, SubBlockError, SubBlockError]
    """After attention, router and experts."""
    routing_agreement: float
    """Share of positions that chose the same experts in both."""
    cold_experts: tuple[int, ...]
    """Experts of the source that no position chose."""
    source_hits: tuple[int, ...]
    """For each expert, how many positions chose it."""
    target_hits: tuple[int, ...]
    computed_once: bool
    """Whether one computation served both sides, whose weights and input were equal."""


@dataclass(frozen=True)
class TokenPosition:
    """A position of the token set."""

    sequence: str
    position: int


@dataclass(frozen=True)
class SequenceLength:
    """A sequence of the token set, by name."""

    name: str
    length: int


@dataclass(frozen=True)
class NextTokens:
    """The most likely tokens after a prompt, with probabilities, strongest first."""

    prompt: str
    source: tuple[tuple[int, float], ...]
    target: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class ParityReport:
    """All numbers of one comparison; `dataclasses.asdict` of it is JSON."""

    passed: bool
    violations: tuple[str, ...]
    """Each limit that is exceeded, in words."""
    limits: Limits
    dtype: str
    hardware: str
    torch_version: str
    token_digest: str
    config_differences: tuple[str, ...]
    """Numbers of the two models that differ, in words."""
    overall: Summary
    buckets: dict[str, Summary]
    """The same by position, e.g. `<128`, `128-4095`, `>=4096`."""
    window: int
    original_length: int
    """YaRN's, before scaling; both numbers as the source has them."""
    kl_by_position: tuple[KlRange, ...]
    """In ranges of half an octave, cut at the window and at the original length."""
    sequences: tuple[SequenceLength, ...]
    worst_kl: TokenPosition
    worst_delta: TokenPosition
    layers: tuple[LayerReport, ...]
    first_over: SubBlockError | None
    """The first sub-block whose error exceeds the limit."""
    source_feeding: tuple[str, ...]
    """The tensors that feed it, as the source stores them."""
    target_feeding: tuple[str, ...]
    next_tokens: tuple[NextTokens, ...]
    """What both expect after the prompts that were given by hand."""

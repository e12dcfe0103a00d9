"""Records of executed steps, for journal, manifest and report."""

from __future__ import annotations

from dataclasses import dataclass, field

from gptoss_convert.codecs.stats import EncodeStats, ScaleStatistics


@dataclass(frozen=True, slots=True)
class Region:
    """A run of bytes that was written or read, and its CRC-32."""

    file: str
    offset: int
    length: int
    crc: int


@dataclass(frozen=True, slots=True)
class Effect:
    """What derivations did to values beyond moving their bits; `a + b` is a, then b."""

    encoded: EncodeStats = field(default_factory=EncodeStats)
    cast_values: int = 0
    """Values that a cast to BF16 rounded."""

    def __add__(self, other: Effect) -> Effect:
        return Effect(self.encoded + other.encoded, self.cast_values + other.cast_values)


@dataclass(frozen=True, slots=True)
class Digest:
    """What the values of a step, or of a piece of it, are."""

    fingerprint: int | None
    """Their part of the fingerprint of their weight and layer, None where no values are stored."""
    finite: bool
    """Whether none of them is an infinity or NaN."""


@dataclass(frozen=True, slots=True)
class Anomalies:
    """What one step found; a parameter without experts counts as expert 0."""

    nonfinite: int = 0
    first: str = ""
    """Tensor, place and value of the first infinity or NaN."""
    zeros: tuple[int, ...] = ()
    """Experts of which all that the step holds is zero."""


@dataclass(frozen=True, slots=True)
class Done:
    """A finished step: what it wrote, and what its values are."""

    step: int
    """Its number in the plan."""
    regions: tuple[Region, ...]
    fingerprint: int | None
    """The step's part of the fingerprint of its weight and layer, None if it wrote hints only."""
    scales: ScaleStatistics
    encoded: EncodeStats
    cast_values: int
    """Values that a cast to BF16 rounded."""
    anomalies: Anomalies

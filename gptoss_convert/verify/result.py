"""What a verification is asked, and what it answers: the levels, the choices, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

LEVELS = ("header", "values", "logits", "oracle")
LOSSLESS = "lossless"


@dataclass(frozen=True)
class VerifyOptions:
    """Every choice of a verification."""

    level: str = "logits"
    source_format: str | None = None
    target_format: str | None = None
    revision: str | None = None
    """Of a SOURCE on the Hub: a branch, a tag or a commit."""
    device: str = "auto"
    """`auto` takes a GPU if there is one."""
    dtype: str = "float32"
    """Of the forward pass: `float32`, or `bf16`, which is fast and coarse."""
    tokens: Path | None = None
    """JSON lines of token ids or texts, or plain text, instead of the fixed token set."""
    prompt: str | None = None
    """Text whose most likely next tokens are shown for both sides."""
    max_length: int | None = None
    """Longest sequence of the fixed token set."""
    sample: int | None = None
    """About the most positions of the fixed token set."""
    layers: int | None = None
    """Compare only so many layers."""
    limits: str = LOSSLESS
    """Table of limits.toml; with any but `lossless` the logits decide, not the values."""
    workers: int | None = None
    max_memory: int = 4_000_000_000
    statistics: bool = False
    """Collect what only a report shows: SQNR by expert, histograms of MXFP4 scales."""


@dataclass(frozen=True)
class Level:
    """What one level found."""

    name: str
    same: bool
    seconds: float
    text: str
    """One line for people."""
    findings: tuple[str, ...] = ()
    """What differs, in words, worst or first of its kind first."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Everything that was measured, as plain data."""


@dataclass(frozen=True)
class Verification:
    """Two checkpoints held against each other."""

    source: Mapping[str, Any]
    target: Mapping[str, Any]
    limits: str
    levels: tuple[Level, ...]

    @property
    def same(self) -> bool:
        """Whether the checkpoints are the same model, within the limits."""
        return all(level.same for level in self._deciding)

    @property
    def verdict(self) -> str:
        """The answer in one line."""
        wrong = next((level for level in self._deciding if not level.same), None)
        if wrong:
            return f"different: {wrong.findings[0]}"
        within = "" if self.limits == LOSSLESS else f", within the limits '{self.limits}'"
        return f"same: {self._deciding[-1].text}{within}"

    @property
    def _deciding(self) -> list[Level]:
        tolerant = self.limits != LOSSLESS and any(one.name == "logits" for one in self.levels)
        return [one for one in self.levels if not (tolerant and one.name == "values")]

    def summary(self) -> dict[str, Any]:
        """The verification as plain data."""
        return {"same": self.same, "verdict": self.verdict, **asdict(self)}

"""What a verification is asked, and what it answers: the levels, the choices, the verdict."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
from gptoss_convert.formats.choices import Choices
from gptoss_convert.formats.option import memory_option, option, workers_option

LEVELS = ("header", "values", "logits", "oracle")
LOSSLESS = "lossless"
LOSSY = "lossy"
"""For a fine-tune and what rounding to MXFP4 made of it."""


@dataclass(frozen=True)
class VerifyOptions(AdapterOptions):
    """Every choice of a verification."""

    level: str = option(
        "logits", "How deep to look; each level includes those before it.", among=LEVELS
    )
    source: Choices = field(default_factory=Choices)
    target: Choices = field(default_factory=Choices)
    revision: str | None = option(
        None, "SOURCE on the Hub: a branch, tag or commit.", shown="its main branch"
    )
    device: str = option(
        "auto",
        "Where to compute logits; auto takes a GPU if there is one.",
        among=("auto", "cpu", "cuda"),
    )
    dtype: str = option(
        "float32",
        "What to compute logits in; bf16 is faster and coarser.",
        among=("float32", "bf16"),
    )
    tokens: Path | None = option(
        None,
        "JSON lines (.jsonl) of token ids or texts, or a text, instead of the fixed token set.",
    )
    prompt: str | None = option(
        None, "Show the most likely next tokens of both sides after this text."
    )
    max_length: int | None = option(
        None,
        "Longest prompt.",
        least=1,
        shown="32768 on a GPU, 4096 on a CPU; with --served what the server takes",
    )
    sample: int | None = option(
        None,
        "About how many positions to score.",
        least=1,
        shown="all; with --served 96 where each takes a request",
    )
    layers: int | None = option(None, "Compare only so many layers.", least=1)
    both: bool = option(False, "Compute both sides also where weights are equal.")
    limits: str = option(
        LOSSLESS,
        "What still counts as the same; beyond lossless the logits decide, not the values. lossy "
        "is for a fine-tune SOURCE and its MXFP4 TARGET.",
        among=(LOSSLESS, "float32", "bfloat16", LOSSY),
    )
    base: Path | None = option(
        None, "For --limits lossy: the model that SOURCE was tuned from, to be compared with."
    )
    max_kl: float | None = option(
        None,
        "For --limits lossy: largest mean KL from SOURCE to TARGET, in nats.",
        shown="0.02, or with --base a quarter of that from base to SOURCE",
    )
    workers: int | None = workers_option()
    max_memory: int | None = memory_option("; 4GB are read ahead for logits")
    statistics: bool = False
    """Collect what only a report shows: SQNR by expert, histograms of MXFP4 scales."""


@dataclass(frozen=True)
class ServedOptions:
    """Every choice of a verification of a server; VerifyOptions says what the common ones mean."""

    model: str | None = option(None, "Server's name for the model, where it serves several.")
    api_key_env: str | None = option(None, "Environment variable with the server's API key.")
    timeout: int = option(300, "Seconds that an answer of the server may take.", least=1)
    every_mistake: bool = option(
        False, "Look for known mistakes of engines within the limits, too: finds small ones."
    )
    source: Choices = field(default_factory=Choices)
    revision: str | None = None
    device: str = "auto"
    tokens: Path | None = None
    max_length: int | None = None
    """Longest prompt; all that the server's context holds, if none is said."""
    sample: int | None = None
    """About how many positions to score: those of the longest sequence, and of others while there
    is room; 96 where each takes a request."""
    max_memory: int | None = None


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

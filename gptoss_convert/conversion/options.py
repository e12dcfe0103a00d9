"""How to convert: every option of `convert`, with the command line's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.formats.options import ImageOptions


@dataclass(frozen=True)
class Options(ImageOptions):
    """How to convert; the defaults are the command line's."""

    source_format: str | None = None
    revision: str | None = None
    """Of a repository on the Hub: a branch, a tag or a commit."""
    stream: bool = False
    """Of a repository on the Hub: convert each shard as it arrives, then drop it."""
    max_memory: int | None = None
    """Bytes; None: 400 MB, or what `workers` take."""
    workers: int | None = None
    scales: Path | None = None
    """An MXFP4 checkpoint, or a BF16 one with a sidecar, whose block scales are preferred."""
    cast: bool = False
    lossy: bool = False
    repair: bool = False
    allow_nonfinite: bool = False
    allow_zero: bool = False
    """Accept weight matrices that are zero throughout."""
    strict: bool = False
    """Refuse a SOURCE with anything that is only remarked on otherwise."""
    iteration: int | None = None
    config: Path | None = None
    vocab_size: int | None = None
    overwrite: bool = False
    restart: bool = False
    """Discard what an interrupted conversion to the same TARGET left."""
    trust_journal: bool = False
    """Go on without reading back what an interrupted conversion wrote."""

    @property
    def choices(self) -> Choices:
        """What concerns the opening of SOURCE."""
        return Choices(
            self.source_format,
            self.repair,
            self.iteration,
            self.config,
            self.vocab_size,
            self.strict,
        )

    @property
    def decisive(self) -> dict[str, Any]:
        """The options that decide what is written, as plain data."""
        free = {"workers", "max_memory", "overwrite", "restart", "trust_journal"}
        # The commit that a revision named, and nothing else about it, stands among the facts.
        free |= {"revision", "stream"}
        return {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(self).items()
            if name not in free
        }

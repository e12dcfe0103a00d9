"""How to convert: every option of `convert`, with the command line's defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
from gptoss_convert.formats.choices import Choices
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.option import memory_option, option, workers_option


@dataclass(frozen=True)
class Options(Choices, AdapterOptions, ImageOptions):
    """How to convert: how SOURCE is read and changed, how TARGET is laid out, how the run goes."""

    revision: str | None = option(
        None, "SOURCE on the Hub: a branch, tag or commit.", shown="its main branch"
    )
    stream: bool = option(
        False, "SOURCE on the Hub: convert each shard as it arrives, then drop it."
    )
    max_memory: int | None = memory_option()
    workers: int | None = workers_option()
    scales: Path | None = option(
        None,
        "An MXFP4 checkpoint, or a BF16 one with a sidecar, whose block scales to prefer. "
        "Restores its bytes, never changes a value.",
        shown="SOURCE's sidecar",
    )
    lossy: str | bool | None = option(
        None,
        "Round values that have no exact MXFP4 form: stochastically, as --lossy alone does, which "
        "keeps an update on average; to nearest; or calibrated on text, which needs torch.",
        among=("stochastic", "nearest", "calibrated"),
        alone="stochastic",
        shown="refuse them",
    )
    scale_rule: str | None = option(
        None,
        "Scales for --lossy nearest: ceil never clips, floor is OCP MX's, even clips little, best "
        "has the smallest error.",
        among=("best", "floor", "ceil", "even"),
        shown="ceil",
    )
    calibrate: str | None = option(
        None,
        "For --lossy calibrated: a text, or JSON lines of texts or token ids, like what the tuned "
        "model will meet; auto is a small text of this package.",
        shown="auto",
    )
    base: Path | None = option(
        None,
        "For --lossy calibrated: the MXFP4 model that SOURCE was tuned from, for the report and "
        "the scales.",
        shown="--scales, or SOURCE's sidecar",
    )
    device: str = option(
        "auto",
        "Where --lossy calibrated computes; auto takes a GPU if there is one.",
        among=("auto", "cpu", "cuda"),
    )
    allow_nonfinite: bool = option(False, "Keep infinities and NaN.")
    allow_zero: bool = option(False, "Keep weight matrices that are zero throughout.")
    overwrite: bool = option(False, "Replace TARGET, once everything is written.")
    restart: bool = option(False, "Discard what an interrupted run left.")
    trust_journal: bool = option(False, "Resume without reading back what was written before.")

    @property
    def decisive(self) -> dict[str, Any]:
        """The options that decide what is written, as plain data."""
        free = {"workers", "max_memory", "overwrite", "restart", "trust_journal"}
        # Only the commit that a revision named decides: the plan's header has it.
        free |= {"revision", "stream", "follow_links"}
        # Nor does the adapter's path decide: the header has the digest of its content.
        free |= {"adapter"}
        return {name: _plain(value) for name, value in vars(self).items() if name not in free}


def _plain(value: Any) -> Any:
    """What JSON makes of an option."""
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value

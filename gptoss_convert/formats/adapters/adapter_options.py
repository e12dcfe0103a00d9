"""Which adapter is merged into SOURCE, and what the adapter does not say itself."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptoss_convert.errors import UsageError
from gptoss_convert.formats.option import option

LAYOUTS = ("peft", "grouped")
ORIENTATIONS = ("normal", "swapped")
ARITHMETICS = ("exact", "peft")


@dataclass(frozen=True)
class AdapterOptions:
    """An adapter on SOURCE."""

    adapter: str | None = option(
        None,
        "Merge this LoRA into SOURCE: a directory, or a repository on the Hub.",
        kind="place",
    )
    adapter_scale: float = option(1.0, "How many times as strong as the adapter says.", shown="1")
    adapter_layout: str | None = option(
        None,
        "The columns of fused experts' lora_B: as PEFT has them, or grouped by expert as Unsloth "
        "had them.",
        among=LAYOUTS,
        shown="as the adapter says",
    )
    adapter_down: str | None = option(
        None,
        "A square down_proj's update: normal, or swapped as PEFT 0.19.1 has it on transformers 4.",
        among=ORIENTATIONS,
        shown="as the adapter shows",
    )
    adapter_arithmetic: str = option(
        "exact", "Round the exact sum once, or as PEFT's own merge does.", among=ARITHMETICS
    )

    def check_adapter_options(self) -> None:
        """Raise UsageError for what is no choice, or means nothing."""
        given = {
            "scale": (self.adapter_scale, 1.0, None),
            "layout": (self.adapter_layout, None, LAYOUTS),
            "down": (self.adapter_down, None, ORIENTATIONS),
            "arithmetic": (self.adapter_arithmetic, "exact", ARITHMETICS),
        }
        for name, (value, default, among) in given.items():
            if value == default:
                continue
            if self.adapter is None:
                raise UsageError(f"--adapter-{name} {value}: there is no --adapter")
            if among is not None and value not in among:
                raise UsageError(f"--adapter-{name} {value}: choose {' or '.join(among)}")
        if not math.isfinite(self.adapter_scale) or self.adapter_scale == 0:
            raise UsageError(f"--adapter-scale {self.adapter_scale}: expects a number other than 0")

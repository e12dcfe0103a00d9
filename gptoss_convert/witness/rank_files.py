"""The reader of rank files: as of all that trainers leave."""

from __future__ import annotations

from gptoss_convert.witness.dcp import WITNESS

__all__ = ["WITNESS"]

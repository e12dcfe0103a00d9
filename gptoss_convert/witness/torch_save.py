"""The reader of whole models in files of torch.save: as of all that trainers leave."""

from __future__ import annotations

from gptoss_convert.witness.dcp import WITNESS

__all__ = ["WITNESS"]

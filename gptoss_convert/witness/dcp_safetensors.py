"""DCP in safetensors has the names that DCP has, and its readers."""

from gptoss_convert.witness.dcp import WITNESS

__all__ = ["WITNESS"]

"""Convert and verify GPT-OSS checkpoints: Hugging Face, OpenAI's original, Megatron-Core.

>>> from gptoss_convert import Options, convert, inspect, plan
>>> inspect("gpt-oss-20b").encoding
'mxfp4'
>>> convert("gpt-oss-20b", "gpt-oss-20b-bf16", Options(to="hf", dtype="bf16")).seconds
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptoss_convert.errors import GptossError
from gptoss_convert.version import VERSION

if TYPE_CHECKING:
    from gptoss_convert.convert import Conversion, Options, Report, convert, plan
    from gptoss_convert.inspect import Inspection, inspect

__all__ = [
    "Conversion",
    "GptossError",
    "Inspection",
    "Options",
    "Report",
    "__version__",
    "convert",
    "inspect",
    "plan",
]

__version__ = VERSION

_HOME = {"Inspection": "inspect", "inspect": "inspect"}


def __getattr__(name: str) -> object:
    """Import on first use: `import gptoss_convert` alone costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"gptoss_convert.{_HOME.get(name, 'convert')}")
    value = getattr(module, name)
    globals()[name] = value
    return value

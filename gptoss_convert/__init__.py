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
    from gptoss_convert.conversion import Conversion, plan
    from gptoss_convert.inspection import Inspection, inspect
    from gptoss_convert.options import Options
    from gptoss_convert.parameters import Parameter, Parameters, open
    from gptoss_convert.run import Report, convert
    from gptoss_convert.verify.gate import Verification, verify_checkpoints

__all__ = [
    "Conversion",
    "GptossError",
    "Inspection",
    "Options",
    "Parameter",
    "Parameters",
    "Report",
    "Verification",
    "__version__",
    "convert",
    "inspect",
    "open",
    "plan",
    "verify_checkpoints",
]

__version__ = VERSION

_HOME = {
    "Conversion": "conversion",
    "Inspection": "inspection",
    "Options": "options",
    "Parameter": "parameters",
    "Parameters": "parameters",
    "Report": "run",
    "Verification": "verify.gate",
    "convert": "run",
    "inspect": "inspection",
    "open": "parameters",
    "plan": "conversion",
    "verify_checkpoints": "verify.gate",
}


def __getattr__(name: str) -> object:
    """Import on first use: `import gptoss_convert` alone costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"gptoss_convert.{_HOME[name]}")
    value = getattr(module, name)
    globals()[name] = value
    return value

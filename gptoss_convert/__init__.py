"""Convert and verify GPT-OSS checkpoints: Hugging Face, OpenAI's original, Megatron-Core.

>>> from gptoss_convert import Options, convert, inspect, plan
>>> inspect("gpt-oss-20b").encoding
'mxfp4'
>>> convert("gpt-oss-20b", "gpt-oss-20b-bf16", Options(to="hf", dtype="bf16")).seconds
"""

from __future__ import annotations

from gptoss_convert.version import VERSION

TYPE_CHECKING = False
if TYPE_CHECKING:
    from gptoss_convert.check.inspection import Inspection, inspect
    from gptoss_convert.conversion.options import Options
    from gptoss_convert.conversion.plan import Conversion, plan
    from gptoss_convert.conversion.run import Report, convert
    from gptoss_convert.errors import GptossError
    from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
    from gptoss_convert.parameters import Parameter, Parameters, open
    from gptoss_convert.verify.gate import verify_checkpoints
    from gptoss_convert.verify.result import ServedOptions, Verification, VerifyOptions
    from gptoss_convert.verify.served import verify_served

__all__ = [
    "AdapterOptions",
    "Conversion",
    "GptossError",
    "Inspection",
    "Options",
    "Parameter",
    "Parameters",
    "Report",
    "ServedOptions",
    "Verification",
    "VerifyOptions",
    "__version__",
    "convert",
    "inspect",
    "open",
    "plan",
    "verify_checkpoints",
    "verify_served",
]

__version__ = VERSION

_HOME = {
    "AdapterOptions": "formats.adapters.adapter_options",
    "Conversion": "conversion.plan",
    "GptossError": "errors",
    "Inspection": "check.inspection",
    "Options": "conversion.options",
    "Parameter": "parameters",
    "Parameters": "parameters",
    "Report": "conversion.run",
    "ServedOptions": "verify.result",
    "Verification": "verify.result",
    "VerifyOptions": "verify.result",
    "convert": "conversion.run",
    "inspect": "check.inspection",
    "open": "parameters",
    "plan": "conversion.plan",
    "verify_checkpoints": "verify.gate",
    "verify_served": "verify.served",
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

"""config.json: the numbers that define a GPT-OSS model, and what every other key of it means."""

from gptoss_convert.formats.config.numbers import Config, layer_types
from gptoss_convert.formats.config.openai import from_openai, openai_json
from gptoss_convert.formats.config.reading import from_hf, quantization, require_gpt_oss
from gptoss_convert.formats.config.writing import MXFP4_CONFIG, corrections, hf_json, hf_text

__all__ = [
    "MXFP4_CONFIG",
    "Config",
    "corrections",
    "from_hf",
    "from_openai",
    "hf_json",
    "hf_text",
    "layer_types",
    "openai_json",
    "quantization",
    "require_gpt_oss",
]

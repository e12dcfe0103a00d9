"""The config.json of OpenAI's `original/`: exactly the fields of its ModelConfig."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gptoss_convert.errors import InputError
from gptoss_convert.formats.config.numbers import Config, made, number

_KEYS = {
    "num_hidden_layers": "num_hidden_layers",
    "num_experts": "num_local_experts",
    "experts_per_token": "num_experts_per_tok",
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "swiglu_limit": "swiglu_limit",
    "head_dim": "head_dim",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads",
    "sliding_window": "sliding_window",
    "initial_context_length": "original_max_position_embeddings",
    "rope_theta": "rope_theta",
    "rope_scaling_factor": "rope_factor",
    "rope_ntk_alpha": "beta_slow",
    "rope_ntk_beta": "beta_fast",
}
"""The keys of OpenAI's config.json in their order, and the name of the same number here."""
_FLOATS = frozenset(("swiglu_limit", "rope_scaling_factor"))
"""What is written as a float even where it is whole."""
_MAY_BE_FRACTIONS = _FLOATS | {"rope_theta", "rope_ntk_alpha", "rope_ntk_beta"}
_IN_ITS_CODE = {"rms_norm_eps": 1e-05, "rope_truncate": False, "attention_factor": None}
"""What OpenAI's code has built in: another value has no key that could say it."""


def from_openai(where: str, content: Mapping[str, Any]) -> Config:
    """Read the config.json of OpenAI's `original/`: exactly its 16 keys."""
    expected = set(_KEYS)
    if lacking := expected - set(content):
        raise InputError(f"{where}: no {min(lacking)!r}")
    if extra := set(content) - expected:
        raise InputError(
            f"{where}: unknown key {min(extra)!r}; OpenAI's ModelConfig has no such field"
        )
    numbers = {
        name: float(number(where, content, key, float))
        if key in _MAY_BE_FRACTIONS
        else number(where, content, key, int)
        for key, name in _KEYS.items()
    }
    longest = int(numbers["original_max_position_embeddings"] * numbers["rope_factor"])
    return made(where, **numbers, max_position_embeddings=longest, rms_norm_eps=1e-05)


def openai_json(config: Config) -> bytes:
    """OpenAI's config.json: one line, the 16 keys in the released order and number form."""
    for name, built_in in _IN_ITS_CODE.items():
        if (found := getattr(config, name)) != built_in:
            raise InputError(
                f"config: {name} is {found}, OpenAI's layout cannot say it ({built_in})"
            )
    content = {}
    for key, name in _KEYS.items():
        value = getattr(config, name)
        whole = key not in _FLOATS and float(value).is_integer()
        content[key] = int(value) if whole else float(value)
    return json.dumps(content).encode()

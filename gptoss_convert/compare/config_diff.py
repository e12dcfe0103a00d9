"""What differs between the configurations of two checkpoints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from gptoss_convert.formats.config import Config

_STORAGE = frozenset(
    ("quantization_config", "torch_dtype", "dtype", "transformers_version", "_name_or_path")
)
"""Keys of config.json that say how or by what a checkpoint was written, not what it is."""
_REPEATED = frozenset(
    (
        *("experts_per_token", "initial_context_length", "layer_types", "rope_parameters"),
        *("rope_scaling", "rope_theta", "swiglu_alpha", "swiglu_limit"),
    )
)
"""Keys that may be absent or take another form: what they say is compared as numbers."""

Pair = tuple[Any, Any]


@dataclass(frozen=True)
class KeysDiff:
    """What differs between two config.json; keys of objects within objects are joined by dots."""

    added: Mapping[str, Any]
    removed: Mapping[str, Any]
    changed: Mapping[str, Pair]

    @property
    def tells(self) -> bool:
        """Whether a key differs that is about the model, and that its numbers do not cover."""
        heads = {key.partition(".")[0] for key in (*self.added, *self.removed, *self.changed)}
        return bool(heads - _STORAGE - _REPEATED)


def numbers_that_differ(a: Config, b: Config) -> dict[str, Pair]:
    """Each number of the two models that differs, with both values."""
    names = [one.name for one in fields(Config) if one.name != "notes"]
    pairs = {name: (getattr(a, name), getattr(b, name)) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def keys_that_differ(a: str, b: str) -> KeysDiff:
    """The differences between the texts of two config.json."""
    ours, theirs = _flat(json.loads(a)), _flat(json.loads(b))
    both = sorted(ours.keys() & theirs.keys())
    return KeysDiff(
        {key: theirs[key] for key in sorted(theirs.keys() - ours.keys())},
        {key: ours[key] for key in sorted(ours.keys() - theirs.keys())},
        {key: (ours[key], theirs[key]) for key in both if ours[key] != theirs[key]},
    )


def _flat(content: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            result |= _flat(value, f"{prefix}{key}.")
        else:
            result[prefix + key] = value
    return result

"""Documents: results as JSON for programs, each with the schema that it follows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

VERSIONS: Mapping[str, int] = {
    "inspect": 1,
    "adapter": 1,
    "plan": 1,
    "convert": 1,
    "check": 1,
    "verify": 1,
    "diff": 1,
    "error": 1,
}
"""By kind of document; a key that leaves or changes its meaning makes a new version, a key that
joins does not."""


def document(kind: str, content: Mapping[str, Any]) -> str:
    """The content as JSON text that begins with its schema, `gptoss-convert/inspect/1`."""
    schema = f"gptoss-convert/{kind}/{VERSIONS[kind]}"
    return json.dumps(_finite({"schema": schema, **content}), indent=2, allow_nan=False)


def _finite(value: Any) -> Any:
    """The value with infinities and NaN, which JSON has not, as strings: `Infinity`, `NaN`."""
    if isinstance(value, Mapping):
        return {key: _finite(held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(held) for held in value]
    return json.dumps(value) if isinstance(value, float) and not math.isfinite(value) else value

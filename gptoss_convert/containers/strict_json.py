"""JSON from untrusted files: one object, no duplicate keys, nothing nested without end."""

from __future__ import annotations

import json
from math import isfinite
from typing import Any

from gptoss_convert.containers.budget import RECORD, Budget, json_parts
from gptoss_convert.errors import IntegrityError

_MAX_DEPTH = 100


def parse_object(where: str, text: str, budget: Budget = RECORD) -> dict[str, Any]:
    """The object that `text` holds; raises IntegrityError that begins with `where`, and InputError
    for more values than the budget has.
    """
    budget.require(where, json_parts(text))

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content: dict[str, Any] = {}
        for name, value in pairs:
            if name in content:
                raise IntegrityError(f"{where}: key {name!r} appears twice")
            content[name] = value
        return content

    try:
        content = json.loads(
            text, object_pairs_hook=unique, parse_constant=_refuse, parse_float=_finite
        )
    except RecursionError:
        raise IntegrityError(f"{where}: not JSON that anybody writes: nested too deep") from None
    except ValueError as error:
        raise IntegrityError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{where}: expects a JSON object, found {type(content).__name__}")
    _require_flat(where, content)
    return content


def _require_flat(where: str, content: dict[str, Any]) -> None:
    """Refuse what would overflow the stack of whoever prints it."""
    level: list[Any] = [content]
    for _ in range(_MAX_DEPTH):
        values = (v for c in level for v in (c.values() if isinstance(c, dict) else c))
        level = [value for value in values if isinstance(value, dict | list)]
        if not level:
            return
    raise IntegrityError(f"{where}: not JSON that anybody writes: nested too deep")


def _finite(number: str) -> float:
    value = float(number)
    if not isfinite(value):
        raise ValueError(f"{number} is no finite number")
    return value


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")

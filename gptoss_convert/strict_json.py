"""JSON from untrusted files: one object, no duplicate keys."""

from __future__ import annotations

import json
from typing import Any

from gptoss_convert.errors import IntegrityError


def parse_object(where: str, text: str) -> dict[str, Any]:
    """The object that `text` holds; raises IntegrityError that begins with `where`."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        content = dict(pairs)
        if len(content) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise IntegrityError(f"{where}: key {twice!r} appears twice")
        return content

    try:
        content = json.loads(text, object_pairs_hook=unique, parse_constant=_refuse)
    except RecursionError:
        raise IntegrityError(f"{where}: not JSON that anybody writes: nested too deep") from None
    except ValueError as error:
        raise IntegrityError(f"{where}: not JSON: {error}") from None
    if not isinstance(content, dict):
        raise IntegrityError(f"{where}: expects a JSON object, found {type(content).__name__}")
    return content


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")

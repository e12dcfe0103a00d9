"""Folding: many tensor names in few words, `model.layers.{0..35}.self_attn.sinks`."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

_NUMBER = re.compile(r"(?<=[._])(\d+)(?=\.)")


def ranges(numbers: Iterable[int]) -> str:
    """`0..3,7` for {0, 1, 2, 3, 7}."""
    parts: list[str] = []
    ordered = sorted(set(numbers))
    start = 0
    for i, number in enumerate(ordered):
        if i + 1 == len(ordered) or ordered[i + 1] != number + 1:
            first = ordered[start]
            parts.append(str(first) if first == number else f"{first}..{number}")
            start = i + 1
    return ",".join(parts)


def fold(names: Iterable[str], limit: int = 4) -> str:
    """The names, layers and experts folded into ranges, at most `limit` groups, then a count."""
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name in sorted(names):
        numbers = tuple(int(number) for number in _NUMBER.findall(name))
        groups[_NUMBER.sub("{}", name)].append(numbers)
    parts = [_fold_group(pattern, numbers) for pattern, numbers in groups.items()]
    rest = len(parts) - limit
    return ", ".join(parts[:limit]) + (f" and {rest} more groups" if rest > 0 else "")


def _fold_group(pattern: str, numbers: list[tuple[int, ...]]) -> str:
    for position in zip(*numbers, strict=True):
        text = str(position[0]) if len(set(position)) == 1 else f"{{{ranges(position)}}}"
        pattern = pattern.replace("{}", text, 1)
    return pattern

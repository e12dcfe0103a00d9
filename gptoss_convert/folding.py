"""Folding: many tensor names in few words, `model.layers.{0..35}.self_attn.sinks`."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import zip_longest

_NUMBER = re.compile(r"(?<=[._])(0|[1-9][0-9]*)(?=\.)")

Numbers = tuple[int, ...]


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
    groups: dict[tuple[str, ...], set[Numbers]] = defaultdict(set)
    for name in sorted(names):
        pieces = _NUMBER.split(name)
        groups[tuple(pieces[::2])].add(tuple(map(int, pieces[1::2])))
    parts = [_name(texts, box) for texts, numbers in groups.items() for box in _full_boxes(numbers)]
    rest = len(parts) - limit
    return ", ".join(parts[:limit]) + (f" and {rest} more groups" if rest > 0 else "")


def _full_boxes(numbers: Iterable[Numbers]) -> Iterator[tuple[Iterable[int], ...]]:
    """The numbers as products of ranges: nothing is claimed that is not there."""
    numbers = sorted(numbers)
    positions = [set(position) for position in zip(*numbers, strict=True)]
    if math.prod(map(len, positions)) == len(numbers):
        yield tuple(positions)
        return
    tails: dict[int, list[Numbers]] = defaultdict(list)
    for first, *tail in numbers:
        tails[first].append(tuple(tail))
    firsts: dict[tuple[Numbers, ...], list[int]] = defaultdict(list)
    for first, tail in tails.items():
        firsts[tuple(tail)].append(first)
    for tail, first in firsts.items():
        for box in _full_boxes(tail):
            yield (first, *box)


def _name(texts: tuple[str, ...], box: Iterable[Iterable[int]]) -> str:
    spans = [ranges(position) for position in box]
    numbers = [span if span.isdigit() else f"{{{span}}}" for span in spans]
    return "".join(part for pair in zip_longest(texts, numbers, fillvalue="") for part in pair)

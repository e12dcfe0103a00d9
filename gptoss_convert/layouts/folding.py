"""Folding: many tensors in few words, `model.layers.{0..35}.self_attn.sinks`."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.layouts.ranges import ranges

_NUMBER = re.compile(r"(?<=[._])(0|[1-9][0-9]{0,8})(?=\.)")

Numbers = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TensorGroup:
    """Tensors of one dtype and shape whose names differ in layer or expert alone."""

    name: str
    """The names, folded."""
    count: int
    dtype: str
    shape: tuple[int, ...]
    """Of each of them."""
    nbytes: int
    """Of all of them."""

    def summary(self) -> dict[str, Any]:
        """The group as plain data."""
        return {
            "name": self.name,
            "count": self.count,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.nbytes,
        }


def fold(names: Iterable[str], limit: int = 4) -> str:
    """The names, layers and experts folded into ranges, at most `limit` groups, then a count."""
    parts = [pattern for pattern, _ in _patterns(names)]
    rest = len(parts) - limit
    return ", ".join(parts[:limit]) + (f" and {rest} more groups" if rest > 0 else "")


def fold_tensors(chunks: Iterable[Chunk], order: Iterable[str]) -> list[TensorGroup]:
    """The tensors of a checkpoint, folded; in the order that `order` names them, others last."""
    ranks = {name: rank for rank, name in enumerate(order)}
    alike: dict[tuple[tuple[str, ...], str, tuple[int, ...]], set[str]] = defaultdict(set)
    for chunk in chunks:
        template = tuple(_NUMBER.split(chunk.tensor)[::2])
        alike[template, chunk.dtype, chunk.shape].add(chunk.tensor)

    def rank(names: Iterable[str]) -> tuple[int, str]:
        return min((ranks.get(name, len(ranks)), name) for name in names)

    return [
        TensorGroup(name, count, dtype, shape, count * math.prod(shape) * DTYPE_BYTES[dtype])
        for (_, dtype, shape), names in sorted(alike.items(), key=lambda item: rank(item[1]))
        for name, count in _patterns(names)
    ]


def _patterns(names: Iterable[str]) -> Iterator[tuple[str, int]]:
    """Each folded name and how many it stands for."""
    groups: dict[tuple[str, ...], set[Numbers]] = defaultdict(set)
    for name in sorted(names):
        pieces = _NUMBER.split(name)
        groups[tuple(pieces[::2])].add(tuple(map(int, pieces[1::2])))
    for texts, numbers in groups.items():
        for box in _full_boxes(numbers):
            yield _name(texts, box), math.prod(map(len, box))


def _full_boxes(numbers: Iterable[Numbers]) -> Iterator[tuple[Collection[int], ...]]:
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

"""Partitions of work among ranks, the same on each of them."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from itertools import pairwise


def balanced(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each item: the costliest first, each to the rank that has least to do.

    The most that one rank gets exceeds the mean by less than one item.
    """
    held = [(0.0, rank) for rank in range(ranks)]
    dealt = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        cost, dealt[item] = held[0]
        heapq.heapreplace(held, (cost + costs[item], dealt[item]))
    return dealt


def contiguous(sizes: Sequence[int], ranks: int) -> list[range]:
    """A range of indexes for each rank; the largest sum of sizes is as small as can be."""
    low, high = max([-(-sum(sizes) // ranks), *sizes]), sum(sizes)
    while low < high:
        middle = (low + high) // 2
        if len(_ends(sizes, middle)) <= ranks:
            high = middle
        else:
            low = middle + 1
    ends = _ends(sizes, low)
    ends += [len(sizes)] * (ranks - len(ends))
    return [range(start, end) for start, end in pairwise([0, *ends])]


def _ends(sizes: Sequence[int], limit: int) -> list[int]:
    """Where ranges end that are as long as `limit` bytes allow."""
    ends: list[int] = []
    total = 0
    for index, size in enumerate(sizes):
        if total + size > limit:
            ends.append(index)
            total = 0
        total += size
    return [*ends, len(sizes)]

"""Dealing work to ranks."""

from __future__ import annotations

import heapq
from collections.abc import Sequence


def deal(costs: Sequence[float], ranks: int) -> list[int]:
    """The rank that does each item: the costliest first, each to the rank that has least to do.

    The same on every rank. The most that one rank gets exceeds the mean by less than one item.
    """
    held = [(0.0, rank) for rank in range(ranks)]
    dealt = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda item: -costs[item]):
        cost, dealt[item] = held[0]
        heapq.heapreplace(held, (cost + costs[item], dealt[item]))
    return dealt

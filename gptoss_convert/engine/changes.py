"""What a plan changes on the way: merges and roundings. numpy is imported only if there is any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gptoss_convert.engine.derivations import Change
from gptoss_convert.layouts.updates import CACHED, Update, cut, largest_bytes


@dataclass(frozen=True)
class Changes:
    """The changes of a plan, and the memory that they take beside its buffers."""

    by_weight: Mapping[str, Sequence[Change]] = field(default_factory=dict)
    worker_bytes: int = 0
    """For each worker at most."""
    shared_bytes: int = 0
    """For all of them together."""


def merges_of(updates: Sequence[Update], arithmetic: str) -> Changes:
    """The merge of these updates, whose sums are rounded by this arithmetic."""
    if not updates:
        return Changes()
    from gptoss_convert.engine.merging import merges

    parts = tuple(cut(updates))
    largest = largest_bytes(parts)
    return Changes(merges(parts, arithmetic), largest, CACHED * largest)

"""What a plan changes on the way: merges and roundings. numpy is imported only if there is any."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from gptoss_convert.engine.derivations import Change
from gptoss_convert.layouts.updates import AT_ONCE, Update, cut, kept_bytes


@dataclass(frozen=True)
class Changes:
    """The changes of a plan, and the memory that they take beside its buffers."""

    by_weight: Mapping[str, Sequence[Change]] = field(default_factory=dict)
    worker_bytes: int = 0
    """For each worker at most."""
    shared_bytes: int = 0
    """For all of them together."""
    files_at_once: int | None = None
    """Files that workers should write at the same time at most: what is kept serves so many."""


def merges_of(updates: Sequence[Update], arithmetic: str) -> Changes:
    """The merge of these updates, whose sums are rounded by this arithmetic."""
    if not updates:
        return Changes()
    from gptoss_convert.engine.merging import merges

    parts = tuple(cut(updates))
    # A worker arranges both halves of a matrix, pads one, and takes its lengths in float64.
    each = 4 * max(one.matrix_bytes for one in parts)
    kept, all_of_them = kept_bytes(parts)
    return Changes(merges(parts, arithmetic), each, kept, None if all_of_them else AT_ONCE)

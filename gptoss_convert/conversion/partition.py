"""Shares of a plan, one for each rank, and the checks needed where several write one TARGET."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from gptoss_convert.containers.json_records import from_json, to_json
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.conversion.resume import same_bytes
from gptoss_convert.conversion.target import journal_path, locked_journal, work_path
from gptoss_convert.engine.execute import written_ranges
from gptoss_convert.engine.records import Done, Region
from gptoss_convert.engine.steps import Plan
from gptoss_convert.errors import DiskError, UsageError
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.files import SourceFiles
from gptoss_convert.machine.partition import contiguous
from gptoss_convert.machine.ranks import Ranks


def shares_of(plan: Plan, numbers: Sequence[int], ranks: int) -> list[Sequence[int]]:
    """For each rank its share of the steps of these numbers, in the order of the target's bytes."""
    sizes = [plan.steps[number].moved_bytes() for number in numbers]
    return [numbers[part.start : part.stop] for part in contiguous(sizes, ranks)]


def spread(plan: Plan, numbers: Sequence[int], at_once: int | None = None) -> list[int]:
    """The same steps, those of each target file spread evenly over the whole.

    A file system may let one thread at a time write to a file; workers that take neighbouring
    steps of this order write to different ones, to `at_once` files if that is given.
    """
    of_file: dict[str, list[int]] = defaultdict(list)
    for number in numbers:
        of_file[plan.steps[number].targets[0].file.name].append(number)
    size = at_once or len(of_file)
    return [
        number
        for _, _, number in sorted(
            (file // size, place / len(steps), number)
            for file, steps in enumerate(of_file.values())
            for place, number in enumerate(steps)
        )
    ]


def seams(
    plan: Plan, shares: Sequence[Sequence[int]], mine: int, done: Mapping[int, Done]
) -> Iterator[Region]:
    """What rank `mine` wrote into pages that another rank wrote into, too."""
    ranks: dict[tuple[str, int], set[int]] = defaultdict(set)
    for rank, numbers in enumerate(shares):
        for number in numbers:
            for file, offset, length in written_ranges(plan.steps[number]):
                for page in _ragged(offset, length):
                    ranks[file, page].add(rank)
    for number in shares[mine]:
        for region in done[number].regions:
            pages = _ragged(region.offset, region.length)
            if any(len(ranks[region.file, page]) > 1 for page in pages):
                yield region


def _ragged(offset: int, length: int) -> set[int]:
    """The pages that a run of bytes does not fill."""
    end = offset + length
    return {at // PAGE for at in (offset, end) if at % PAGE}


def require_same_plan(conversion: Conversion, lead: Mapping[str, Any], ranks: Ranks) -> None:
    """Refuse a plan that differs from rank 0's; where SOURCE lies may differ."""
    mine = conversion.header
    for part in ("tool", "options", "headers", "plan", "to"):
        if mine[part] != lead[part]:
            raise UsageError(
                f"{conversion.source.place}: another {part} than on rank 0: "
                f"{lead[part]!r:.80} there, {mine[part]!r:.80} here"
            )


def require_shared(target: Path, ranks: Ranks) -> None:
    """Refuse a TARGET beside which some rank does not see what rank 0 writes."""
    if ranks.size == 1:
        return
    token = os.urandom(16).hex()
    if ranks.rank == 0:
        for rank in range(1, ranks.size):
            with locked_journal(target, rank) as descriptor:
                os.pwrite(descriptor, token.encode(), 0)
                os.fsync(descriptor)
    token = ranks.broadcast(token)
    seen = ranks.rank == 0
    with suppress(OSError):
        seen = seen or journal_path(target, ranks.rank).read_text() == token
    answers = ranks.gather([seen, ranks.host])
    blind = [f"rank {n} on {host}" for n, (seen, host) in enumerate(answers) if not seen]
    if blind:
        raise UsageError(
            f"{target}: {blind[0]} does not see what rank 0 on {answers[0][1]} writes beside it; "
            "TARGET must lie on a file system that all machines share"
        )


def require_kept(
    conversion: Conversion,
    shares: Sequence[Sequence[int]],
    done: Mapping[int, Done],
    ranks: Ranks,
) -> None:
    """Refuse a file system that loses bytes where several machines write into one page.

    Once all have synced, each rank reads back what one of another machine wrote at such places.
    """
    if ranks.local_size == ranks.size:
        return
    mine = [to_json(region) for region in seams(conversion.plan, shares, ranks.rank, done)]
    other = (ranks.rank + ranks.local_size) % ranks.size
    theirs = [from_json(Region, region) for region in ranks.gather(mine)[other]]
    arena = Arena(conversion.plan.buffer_bytes)
    with SourceFiles() as files:
        for region in theirs:
            if not same_bytes(files, work_path(conversion.target), region, arena):
                raise DiskError(
                    f"{conversion.target}: {region.file}: {region.length} bytes at "
                    f"{region.offset} are not as rank {other} wrote them: this file system "
                    "loses bytes where two machines write into one page; use one machine"
                )

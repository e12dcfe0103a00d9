"""When shards come and go: schedules over plans, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.hub.stream import Schedule


def refs(*names: str) -> tuple[FileRef, ...]:
    return tuple(FileRef(Path("repository"), name) for name in names)


def arrivals(spans: Sequence[tuple[int, ...]]) -> list[set[int]]:
    """The shards that are there whenever one begins to arrive, it included; raises if one cannot.

    Steps finish as late as possible: only when nothing else can happen.
    """
    shards = max((span[-1] for span in spans if span), default=-1) + 1
    schedule = Schedule(refs(*map(str, range(shards))), dict(enumerate(spans)))
    left, arrived, seen = list(schedule.order), 0, []

    def present() -> set[int]:
        return {p for step in left for p in spans[step]} & set(range(arrived))

    while left or arrived < shards:
        if arrived < shards and schedule.may_arrive(arrived, left):
            seen.append(present() | {arrived})
            arrived += 1
        elif left and all(place < arrived for place in spans[left[0]]):
            left.pop(0)
        else:
            raise AssertionError(f"nothing can go on: {arrived} arrived, {len(left)} steps left")
    return seen


def test_shards_of_their_own_steps_come_two_at_a_time():
    seen = arrivals([(place,) for place in range(6) for _ in range(3)])
    assert seen == [{0}, {0, 1}, {1, 2}, {2, 3}, {3, 4}, {4, 5}]


def test_steps_that_span_neighbours_free_the_older_shard_first():
    spans = [(place,) for place in range(5)] + [(place, place + 1) for place in range(4)]
    assert max(map(len, arrivals(spans))) == 2


def test_a_shard_that_a_late_one_needs_stays_and_nothing_waits_for_ever():
    seen = arrivals([(0, 5), *((place,) for place in range(6))])
    assert seen == [{0}, {0, 1}, {0, 1, 2}, {0, 2, 3}, {0, 3, 4}, {0, 4, 5}]


def test_steps_that_need_no_shard_come_first_then_those_that_free_an_older_one():
    assert Schedule(refs("a", "b"), {0: (1,), 1: (0, 1), 2: (0,)}).order == [2, 1, 0]
    assert Schedule(refs("a", "b"), {0: (1,), 1: (), 2: (0,)}).order == [1, 2, 0]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_every_shard_arrives_however_the_steps_span_them(count: int):
    everything = [(a, b) for a in range(count) for b in range(a, count)]
    assert len(arrivals([tuple(sorted({a, b})) for a, b in everything])) == count

"""Parts in memory: joined into one view where they lie at equal distances, and only there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.engine.buffers import Part, byte_ranges, joined
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.layouts.layout import Box

FILE = FileRef(Path(), "file")


def parts_of(boxes: Sequence[Box], positions: Sequence[int], memory: bytearray) -> list[Part]:
    """Row-major u16 parts at these byte positions of one buffer."""
    parts = []
    for box, position in zip(boxes, positions, strict=True):
        shape = [hi - lo for lo, hi in box]
        strides = [2 * math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        extent = Extent("w", box, FILE, 0, tuple(strides), "BF16", "tensor")
        array = np.ndarray(shape, np.uint16, memory, position, strides)
        parts.append(Part(extent, box, position, array))
    return parts


def numbered(memory: bytearray) -> None:
    np.frombuffer(memory, np.uint16)[:] = np.arange(len(memory) // 2)


HALVES: list[Box] = [((0, 1), (0, 3), (0, 4)), ((1, 2), (0, 3), (0, 4))]


def test_two_halves_become_one_view_of_the_same_elements() -> None:
    memory = bytearray(4096)
    numbered(memory)
    halves = parts_of(HALVES, [0, 1024], memory)
    (whole,) = joined(halves)
    assert whole.box == ((0, 2), (0, 3), (0, 4))
    np.testing.assert_array_equal(whole.array, np.concatenate([half.array for half in halves]))


def test_the_order_of_the_parts_does_not_matter() -> None:
    memory = bytearray(4096)
    numbered(memory)
    halves = parts_of(HALVES, [1024, 0], memory)
    (whole,) = joined(halves[::-1])
    np.testing.assert_array_equal(whole.array, np.concatenate([half.array for half in halves]))


def test_parts_longer_than_one_index_are_joined_only_where_they_run_on() -> None:
    boxes: list[Box] = [((0, 2), (0, 4)), ((2, 4), (0, 4))]
    memory = bytearray(4096)
    numbered(memory)
    (whole,) = joined(parts_of(boxes, [0, 16], memory))
    np.testing.assert_array_equal(whole.array, np.arange(16).reshape(4, 4))
    assert len(joined(parts_of(boxes, [0, 32], memory))) == 2


@pytest.mark.parametrize(
    ("boxes", "positions"),
    [
        pytest.param([*HALVES, ((2, 3), (0, 3), (0, 4))], [0, 1024, 1500], id="uneven distances"),
        pytest.param([HALVES[0], ((2, 3), (0, 3), (0, 4))], [0, 1024], id="a hole between"),
        pytest.param([HALVES[0], ((1, 2), (0, 2), (0, 4))], [0, 1024], id="other lengths"),
        pytest.param([HALVES[0], ((1, 2), (3, 6), (0, 4))], [0, 1024], id="diagonal"),
    ],
)
def test_other_parts_stay_apart(boxes: list[Box], positions: list[int]) -> None:
    parts = parts_of(boxes, positions, bytearray(4096))
    assert list(joined(parts)) == parts


def test_parts_outside_the_arena_stay_apart() -> None:
    parts = parts_of(HALVES, [0, 1024], bytearray(4096))
    for part in parts:
        part.position = -1
    assert list(joined(parts)) == parts


def test_runs_cover_a_strided_box_once_and_are_as_long_as_possible() -> None:
    extent = Extent("w", ((0, 4), (0, 3), (0, 5)), FILE, 0, (30, 10, 2), "BF16", "tensor")
    assert list(byte_ranges(extent, ((0, 4), (0, 3), (0, 5)))) == [(0, 120)]
    box = ((0, 4), (1, 3), (0, 5))
    found = list(byte_ranges(extent, box))
    assert found == [(30 * row, 20) for row in range(4)]
    assert all(a + length <= b for (a, length), (b, _) in pairwise(found))


def test_runs_that_lie_close_are_joined_with_the_gaps_between_them() -> None:
    extent = Extent("w", ((0, 4), (0, 3), (0, 5)), FILE, 0, (3000, 10, 2), "BF16", "tensor")
    box = ((0, 4), (0, 3), (1, 3))
    assert list(byte_ranges(extent, box, gap=5)) == [
        (3000 * n + 10 * m, 4) for n in range(4) for m in range(3)
    ]
    assert list(byte_ranges(extent, box, gap=6)) == [(3000 * n, 24) for n in range(4)]
    assert list(byte_ranges(extent, box, gap=2976)) == [(0, 9024)]

"""The oracle level's judgement: near ties of a router excuse what follows them, nothing else."""

import math

import pytest
import torch

from gptoss_convert.verify.oracle_level import Distances, judge
from gptoss_convert.witness.limits import oracle_limits

NARROW, WIDE = oracle_limits(224), oracle_limits(2880)


def distances(deltas: list[float], margins: list[float]) -> Distances:
    return Distances(torch.tensor(deltas), torch.tensor(margins))


def test_a_near_tie_excuses_its_position_and_those_after_it_in_its_sequence() -> None:
    tied = distances([1e-6, 2.0, 3.0], [1.0, NARROW.tie / 2, 1.0])
    clean = distances([2e-6, 1e-6], [1.0, 1.0])
    found = judge([tied, clean], NARROW, NARROW.spread)
    assert (found.positions, found.settled) == (5, 3)
    assert found.max_delta == pytest.approx(2e-6)
    assert found.max_delta_anywhere == 3.0
    assert found.finding is None
    assert "3 of 5 positions" in str(found)


def test_a_distance_before_the_tie_or_in_another_sequence_is_found() -> None:
    before = distances([2.0, 1e-6], [1.0, 0.0])
    assert "expects at most 5e-05, found 2" in (judge([before], NARROW, 1.0).finding or "")
    other = [distances([1e-6], [0.0]), distances([2.0], [1.0])]
    assert judge(other, NARROW, 1.0).finding


def test_nan_is_a_finding() -> None:
    assert judge([distances([math.nan], [1.0])], NARROW, 1.0).finding


def test_nothing_to_judge_is_a_finding_not_a_pass() -> None:
    assert "no position" in (judge([distances([0.0], [0.0])], NARROW, 1.0).finding or "")


def test_the_limit_grows_with_the_spread_of_the_logits_and_with_the_width() -> None:
    assert NARROW.largest(0.5) == NARROW.max_delta
    assert NARROW.largest(2 * NARROW.spread) == pytest.approx(2 * NARROW.max_delta)
    assert WIDE.max_delta > NARROW.max_delta

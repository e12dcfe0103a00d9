"""SIGKILL at any system call that changes the disk: the same command again, the same bytes."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.conversion.run import run
from tests.killing import PAIRS, check_point, contents, killed, points, prepare, quick_folder

EVERY_POINT = os.environ.get("GPTOSS_KILL_EVERY_POINT") == "1"
"""Kill at every point of every pair, not at a sample: takes minutes."""
WHOLE = ("openai", "hf-mxfp4")
"""The pair whose points are all taken in every run of the tests."""
SAMPLE = 6

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_a_killed_conversion_ends_in_the_same_bytes(
    folder: Path, pair: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    conversion = prepare(folder, *pair)
    run(conversion)
    expected = contents(conversion.target)
    shutil.rmtree(conversion.target)
    count = points(conversion)
    chosen = range(1, count + 1)
    if not EVERY_POINT and pair != WHOLE:
        chosen = sorted(random.Random(count).sample(chosen, SAMPLE))
    reached = sum(check_point(conversion, point, expected) for point in chosen)
    with capsys.disabled():
        print(f" killed {reached} times at {count} points, same bytes", end="")
    assert reached == len(chosen)


@pytest.mark.parametrize("from_the_end", range(12))
def test_a_replaced_target_is_the_old_one_or_the_new_one(folder: Path, from_the_end: int) -> None:
    conversion = prepare(folder, "openai", "hf-mxfp4")
    run(conversion)
    expected = contents(conversion.target)
    shutil.rmtree(conversion.target)
    replacing = replace(conversion, options=replace(conversion.options, overwrite=True))
    replacing.target.mkdir()
    (replacing.target / "old").write_text("old")
    assert killed(replacing, points_of_overwriting(replacing) - from_the_end)
    assert contents(replacing.target) in ({"old": b"old"}, expected)
    run(replacing)
    assert contents(replacing.target) == expected
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    shutil.rmtree(replacing.target)


def points_of_overwriting(conversion: Conversion) -> int:
    """The points of a run that replaces a TARGET, which it finds again afterwards."""
    count = points(conversion)
    conversion.target.mkdir()
    (conversion.target / "old").write_text("old")
    return count

"""Shares of full-size plans are even, and cover every step once."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path

import pytest

from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.partition import shares_of, spread
from gptoss_convert.conversion.plan import plan
from gptoss_convert.machine.partition import contiguous
from tests.test_golden import LABELS, SIZES, inventory, published_config, write_header_only

RANKS = (2, 3, 8, 31, 48, 63, 64)
TARGETS = {
    "hf-mxfp4": Options("hf", "mxfp4"),
    "hf-published": Options("hf", "mxfp4", shards="published"),
    "hf-bf16": Options("hf", "bf16"),
    "openai": Options("openai", "mxfp4", shards="published"),
    "megatron": Options("megatron"),
}
PAIRS = [
    (size, label, target)
    for size in SIZES
    for label, target in (
        ("hf-mxfp4", "hf-mxfp4"),
        ("hf-mxfp4", "hf-bf16"),
        ("hf-bf16", "hf-published"),
        ("hf-bf16", "hf-bf16"),
        ("hf-mxfp4", "openai"),
        ("hf-mxfp4", "megatron"),
    )
]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Mapping[tuple[str, str], Path]:
    """The released models' headers in front of holes."""
    root = tmp_path_factory.mktemp("headers")
    folders = {}
    for size in SIZES:
        for label in set(LABELS) & {label for _, label, _ in PAIRS}:
            folders[size, label] = folder = root / f"{size}-{label}"
            folder.mkdir()
            config = published_config(size)
            if label == "hf-bf16":
                del config["quantization_config"]
            (folder / "config.json").write_text(json.dumps(config))
            write_header_only(folder / "model.safetensors", inventory(size, label))
    return folders


@pytest.mark.parametrize(("size", "label", "target"), PAIRS)
def test_no_rank_of_64_moves_much_more_than_the_mean(
    headers: Mapping[tuple[str, str], Path], size: str, label: str, target: str
) -> None:
    source = headers[size, label]
    made = plan(source, source.parent / "target", TARGETS[target]).plan
    sizes = [step.moved_bytes() for step in made.steps]
    assert sum(sizes) == made.read_bytes + made.write_bytes
    for count in RANKS:
        shares = contiguous(sizes, count)
        assert [*chain(*shares)] == [*range(len(sizes))]
        assert len(shares) == count
        moved = [sum(sizes[share.start : share.stop]) for share in shares]
        assert max(moved) <= 1.05 * sum(sizes) / count
    some = [*range(5, len(sizes), 2)]
    assert [*chain(*shares_of(made, some, 8))] == some


def ends(sizes: list[int], count: int) -> list[int]:
    return [share.stop for share in contiguous(sizes, count)]


def test_the_largest_run_is_as_small_as_can_be() -> None:
    assert ends([5, 1, 1, 1, 5], 3) == [1, 4, 5]
    assert ends([3, 3, 3, 3], 3) == [2, 4, 4]
    assert ends([9], 4) == [1, 1, 1, 1]
    assert ends([], 2) == [0, 0]


def test_neighbouring_steps_write_to_different_files(
    headers: Mapping[tuple[str, str], Path],
) -> None:
    steps = plan(headers["20b", "hf-mxfp4"], Path("target"), Options("hf", "bf16")).plan
    numbers = range(len(steps.steps))
    order = spread(steps, numbers)
    assert sorted(order) == [*numbers]
    files = [steps.steps[number].targets[0].file.name for number in order]
    count = len(set(files))
    assert count > 4
    # The shards hold about as many steps each, so that each comes up once in about as many.
    windows = [len(set(files[i : i + 2 * count])) for i in range(len(files) - 2 * count)]
    assert min(windows) >= count - 1
    for file in set(files):
        mine = [n for n, name in zip(order, files, strict=True) if name == file]
        assert mine == sorted(mine)


def test_few_files_at_once_where_that_is_asked(headers: Mapping[tuple[str, str], Path]) -> None:
    steps = plan(headers["20b", "hf-mxfp4"], Path("target"), Options("hf", "bf16")).plan
    order = spread(steps, range(len(steps.steps)), at_once=3)
    assert sorted(order) == [*range(len(steps.steps))]
    files = [steps.steps[number].targets[0].file.name for number in order]
    first, last = {}, {}
    for place, name in enumerate(files):
        first.setdefault(name, place)
        last[name] = place
    open_at = [sum(first[name] <= n <= last[name] for name in first) for n in range(len(files))]
    assert max(open_at) == 3 < len(first)

"""Every bad directory is refused by every command that can meet it, with status and message."""

from __future__ import annotations

import fnmatch
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from gptoss_convert import __main__ as entry
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.synth.synth import synth
from tests.faults.cases import CASES, Case

STARTS = {
    "many": Options("hf", workers=1, max_shard_size=700_000),
    "bf16": Options("hf", "bf16", workers=1, keep_scales=False),
    "openai": Options("openai", workers=1),
    "megatron": Options("megatron", workers=1),
}
MANIFEST_CASE = 93
TABLE = Path(__file__).parents[2] / "docs" / "faults.md"
Command = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Good directories, without manifests: those would be one more way to notice."""
    folder = tmp_path_factory.mktemp("faults") / "starts"
    folder.mkdir()
    synth(folder / "one", layers=1, workers=1)
    for name, options in STARTS.items():
        run(plan(folder / "one", folder / name, options))
    for manifest in folder.glob("*/gptoss-convert.json"):
        manifest.unlink()
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    def run_command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gptoss-convert", *map(str, words)])
        status = entry._run()
        lines = capsys.readouterr().err.splitlines()
        return status, next((line for line in lines if line.startswith("error: ")), "")

    return run_command


def commands_of(case: Case, source: Path, target: Path) -> list[tuple[object, ...]]:
    """The command lines that meet the case."""
    inspects = [] if case.reads or "--strict" in case.words else [("inspect", source)]
    depth = ["--read-data"] if case.reads else []
    # A check takes what `convert` takes with an option: rounding, infinities, zeros.
    checks = [] if case.number == 40 and case.reads else [("check", source, *depth, *case.words)]
    converts = [("convert", source, target, "--to", "hf", "--workers", "1", *case.words)]
    if case.number == MANIFEST_CASE:
        return [*checks]
    return [*inspects, *checks, *converts]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.number}-{case.name}")
def test_it_is_refused(case: Case, starts: Path, tmp_path: Path, command: Command) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (tmp_path / "starts").symlink_to(starts)
    shutil.copytree(starts / case.start, source)
    case.spoil(source)
    before = sorted(tmp_path.rglob("*"))
    for words in commands_of(case, source, target):
        status, error = command(*words)
        shown = error.removeprefix("error: ").replace(str(source), "DIR")
        expected = case.error
        if words[0] == "check" and case.reads:
            expected = expected.partition("; pass --allow")[0] + "*"
        assert fnmatch.fnmatchcase(shown, expected), f"{words[0]}:\n  {expected}\n  {shown}"
        assert status == case.status, (words[0], error)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["one", *STARTS])
def test_the_good_directories_are_good(starts: Path, name: str, command: Command) -> None:
    for words in (("inspect", starts / name), ("check", starts / name, "--read-data")):
        assert command(*words) == (0, "")


def test_each_case_has_a_name_of_its_own() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(replace(case) == case for case in CASES)


def test_each_case_stands_in_the_table_of_faults() -> None:
    text = TABLE.read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\d+) \|(.*)\|$", text, re.MULTILINE))
    assert {*range(1, 97)} <= {*map(int, rows)}
    for case in CASES:
        assert f"`{case.name}`" in rows[str(case.number)]


def test_each_row_of_faults_names_tests_that_exist() -> None:
    tests = Path(__file__).parents[1]
    defined: set[str] = set()
    for file in tests.rglob("*.py"):
        defined |= set(re.findall(r"^def (\w+)\(", file.read_text(encoding="utf-8"), re.MULTILINE))
    for row in TABLE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| (\d+) \|.*\| ([^|]*) \|$", row):
            uncovered = match[2].startswith(("not covered", "TARGET is not cut"))
            names = set(re.findall(r"`(test_\w+)`" if uncovered else r"`(\w+)`", match[2]))
            assert names or uncovered, row
            assert names <= defined, (match[1], names - defined)

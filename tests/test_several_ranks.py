"""Several ranks write what one process writes, byte for byte, whatever happens to them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.partition import require_same_plan
from gptoss_convert.conversion.plan import Conversion, plan
from gptoss_convert.conversion.run import run
from gptoss_convert.conversion.target import journal_path, locked_journal
from gptoss_convert.conversion.workspace import workspace
from gptoss_convert.engine import execute
from gptoss_convert.errors import TargetError, UsageError
from gptoss_convert.machine.ranks import Ranks
from tests.killing import PAIRS, Countdown, contents, one_by_one, prepare, quick_folder
from tests.rank_processes import Ended, run_ranks
from tests.torchrun import ROOT, torchrun

KILLED = "rank {} on 127.0.0.1: ended without a word, as a process does that is killed"

pytestmark = pytest.mark.filterwarnings(
    "ignore:This process .* is multi-threaded:DeprecationWarning"
)


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    with quick_folder() as path:
        yield path


@pytest.fixture(scope="module")
def planned(folder: Path) -> Callable[[str, str], tuple[Conversion, dict[str, bytes]]]:
    """A pair's conversion, planned once, and what one process writes."""
    made: dict[tuple[str, str], tuple[Conversion, dict[str, bytes]]] = {}

    def planned(source: str, target: str) -> tuple[Conversion, dict[str, bytes]]:
        if (source, target) not in made:
            conversion = prepare(folder, source, target)
            run(conversion)
            made[source, target] = conversion, contents(conversion.target)
            shutil.rmtree(conversion.target)
        return made[source, target]

    return planned


Planned = Callable[[str, str], tuple[Conversion, dict[str, bytes]]]


def check_written(conversion: Conversion, expected: dict[str, bytes]) -> None:
    """TARGET is as expected, and nothing lies beside it; removes it."""
    assert contents(conversion.target) == expected
    assert left_beside(conversion) == []
    shutil.rmtree(conversion.target)


def left_beside(conversion: Conversion) -> list[str]:
    return [path.name for path in conversion.target.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("pair", PAIRS, ids="-to-".join)
def test_every_pair_is_written_as_by_one_process(planned: Planned, pair: tuple[str, str]) -> None:
    conversion, expected = planned(*pair)
    for size, local_size in ((2, 2), (4, 1)):
        assert run_ranks(conversion, size, local_size=local_size) == [Ended(0, "")] * size
        check_written(conversion, expected)


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("pair", [("openai", "hf-mxfp4"), ("hf-mxfp4", "megatron")])
def test_a_killed_rank_ends_the_others_and_the_same_command_goes_on(
    planned: Planned, pair: tuple[str, str], victim: int
) -> None:
    conversion, expected = planned(*pair)
    killed = 0
    for number, point in enumerate((1, 4, 9, 23, 57, 140)):

        def die(ranks: Ranks, point: int = point) -> None:
            if ranks.rank == victim:
                execute.run_all = one_by_one  # type: ignore[assignment]
                Countdown(point).install()

        ended = run_ranks(conversion, 3, in_child=die)
        if ended[victim].status == -signal.SIGKILL:
            killed += 1
            others = [end for rank, end in enumerate(ended) if rank != victim]
            assert others == [Ended(6, KILLED.format(victim))] * 2
            if conversion.target.exists():
                assert contents(conversion.target) == expected
            again = 1 + number % 4
            assert run_ranks(conversion, again) == [Ended(0, "")] * again
        check_written(conversion, expected)
    assert killed >= 3


def test_what_ranks_have_done_is_not_done_again(planned: Planned) -> None:
    conversion, expected = planned("openai", "hf-mxfp4")

    def die(ranks: Ranks) -> None:
        if ranks.rank == 1:
            execute.run_all = one_by_one  # type: ignore[assignment]
            Countdown(60).install()

    assert run_ranks(conversion, 2, in_child=die)[1].status == -signal.SIGKILL
    journals = [journal_path(conversion.target, rank).read_bytes() for rank in range(2)]
    # Each begins with a header; rank 0's names the hidden directory, too.
    before = sum(journal.count(b"\n") - 1 for journal in journals) - 1
    assert before >= 8
    assert journals[1].count(b"\n") >= 3
    assert run(conversion).resumed_steps == before
    check_written(conversion, expected)


def test_a_rank_that_finds_damage_ends_all_with_its_words(folder: Path) -> None:
    source = prepare(folder, "hf-bf16", "hf-bf16").source.root
    damaged = folder / "damaged"
    shutil.copytree(source, damaged)
    with (damaged / "model.safetensors").open("r+b") as shard:
        shard.seek(-2, os.SEEK_END)
        shard.write(b"\x80\x7f")
    conversion = plan(damaged, folder / "target", Options("hf", "bf16"))
    ended = run_ranks(conversion, 3)
    assert [end.status for end in ended] == [4, 4, 4]
    (finder,) = (rank for rank, end in enumerate(ended) if not end.words.startswith("rank "))
    words = ended[finder].words
    assert words.endswith("pass --allow-nonfinite to keep such values")
    assert {end.words for end in ended} == {words, f"rank {finder} on {Ranks().host}: {words}"}
    assert not conversion.target.exists()
    assert left_beside(conversion) == []


def test_another_run_is_refused_while_ranks_of_one_are_left(planned: Planned) -> None:
    conversion, expected = planned("openai", "hf-mxfp4")
    busy = f"{conversion.target}: another process is writing it"
    with workspace(conversion.target, restart=False, names=conversion.names):
        ended = run_ranks(conversion, 2)
    assert ended[0] == Ended(8, busy)
    assert ended[1] == Ended(8, f"rank 0 on {Ranks().host}: {busy}")
    with (
        locked_journal(conversion.target, rank=3),
        pytest.raises(TargetError, match="another process is writing it"),
    ):
        run(conversion)
    run(conversion)
    check_written(conversion, expected)


def test_a_target_that_the_ranks_do_not_share_is_refused(
    planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two working directories stand for two machines: the same name, another place."""
    conversion, _ = planned("openai", "hf-mxfp4")
    conversion = replace(conversion, target=Path("target"))
    places = [tmp_path / "first", tmp_path / "second"]
    for place in places:
        place.mkdir()
    monkeypatch.chdir(tmp_path)
    ended = run_ranks(conversion, 2, in_child=lambda ranks: os.chdir(places[ranks.rank]))
    assert [end.status for end in ended] == [2, 2]
    host = Ranks().host
    for end in ended:
        assert end.words.removeprefix(f"rank 0 on {host}: ").removeprefix("rank 1 on ") == (
            f"target: rank 1 on {host} does not see what rank 0 on {host} writes beside it; "
            "TARGET must lie on a file system that all machines share"
        )
    assert [[*place.iterdir()] for place in places] == [[], []]


def test_bytes_lost_where_two_machines_meet_are_found(planned: Planned) -> None:
    """Rank 1 writes to a file system that forgets what fills no page."""
    conversion, expected = planned("openai", "hf-mxfp4")

    def forget(ranks: Ranks) -> None:
        written = os.pwrite

        def pwrite(descriptor: int, content: bytes, offset: int) -> int:
            journal = bytes(content[:1]) not in b"\x00" and bytes(content[8:9]) == b" "
            if not journal and len(content) % 4096:
                return len(content)
            return written(descriptor, content, offset)

        if ranks.rank == 1:
            os.pwrite = pwrite

    ended = run_ranks(conversion, 2, local_size=1, in_child=forget)
    assert [end.status for end in ended] == [5, 5]
    assert "are not as rank 1 wrote them: this file system loses bytes" in ended[0].words
    assert not conversion.target.exists()
    run(conversion)
    check_written(conversion, expected)


def test_a_rank_with_another_plan_is_refused(planned: Planned) -> None:
    conversion, _ = planned("openai", "hf-mxfp4")
    elsewhere = dict(conversion.header) | {"source": {}, "from": {}}
    require_same_plan(conversion, elsewhere, Ranks())
    with pytest.raises(UsageError, match=r"another plan than on rank 0: 'x' there, '[0-9a-f]{64}'"):
        require_same_plan(conversion, elsewhere | {"plan": "x"}, Ranks())


def test_every_process_numbers_the_steps_alike(planned: Planned) -> None:
    conversion, _ = planned("hf-bf16", "hf-mxfp4")
    code = (
        "import sys; from gptoss_convert import Options, plan\n"
        "steps = plan(*sys.argv[1:], Options('hf', 'mxfp4')).plan.steps\n"
        "print([(s.family.weight, s.box, s.sources, s.targets) for s in steps])"
    )
    words = [sys.executable, "-c", code, str(conversion.source.root), str(conversion.target)]
    answers = {
        subprocess.run(
            words,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(seed)},
            stdout=subprocess.PIPE,
            check=True,
        ).stdout
        for seed in range(3)
    }
    assert len(answers) == 1


LAUNCHED = """
import sys
from pathlib import Path
from gptoss_convert.machine.ranks import join
from gptoss_convert.conversion.run import run
from tests.killing import prepare
folder, *pairs = sys.argv[1:]
with join() as ranks:
    for pair in pairs:
        run(prepare(Path(folder), *pair.split("-to-")), ranks=ranks)
print("torch" in sys.modules)
"""
DIFFERENT = [pair for pair in PAIRS if pair[0] != pair[1]]


@pytest.mark.parametrize(
    ("processes", "pairs"),
    [(2, DIFFERENT), (4, [("openai", "hf-bf16"), ("hf-bf16", "hf-mxfp4")])],
)
def test_ranks_that_torchrun_starts_write_the_same(
    folder: Path, planned: Planned, processes: int, pairs: list[tuple[str, str]]
) -> None:
    written = [planned(*pair) for pair in pairs]
    (folder / "launched.py").write_text(LAUNCHED)
    done = torchrun(processes, "launched.py", folder, *map("-to-".join, pairs), folder=folder)
    assert done.status == 0, done.error
    assert (done.output.count("False"), done.output.count("True")) == (processes, 0)
    for conversion, expected in written:
        check_written(conversion, expected)


def test_torchrun_ends_when_a_rank_is_killed(folder: Path, planned: Planned) -> None:
    """It is killed as soon as all have met: while they import, plan or take their first step."""
    conversion, expected = planned("hf-mxfp4", "megatron")
    words = ["-m", "gptoss_convert", "convert", conversion.source.root, conversion.target]
    words += ["--to", "megatron", "--workers", "1", "--rank-log", "logs"]
    killed = torchrun(3, *words, folder=folder, meanwhile=lambda: kill_rank(folder / "logs", 2))
    assert killed.status != 0
    assert not conversion.target.exists()
    reason = f"error: {KILLED.format(2).replace('127.0.0.1', Ranks().host)}"
    assert killed.error.splitlines().count(reason) == 2
    for rank in (0, 1):
        log = (folder / "logs" / f"rank-{rank:05d}.log").read_text()
        assert log.splitlines()[1:] == [reason]
    run(conversion)
    check_written(conversion, expected)


def kill_rank(logs: Path, rank: int) -> None:
    """Kill a rank as soon as all have met."""
    log = logs / f"rank-{rank:05d}.log"
    while not log.exists() or "\n" not in log.read_text():
        time.sleep(0.01)
    process = log.read_text().partition("process ")[2].partition(":")[0]
    os.kill(int(process), signal.SIGKILL)

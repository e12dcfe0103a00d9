"""Ranks hear one another, and of one another's end."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.errors import NetworkError, RankError
from gptoss_convert.machine.ranks import ALONE, Ranks, join
from tests.torchrun import ROOT, torchrun

ENDED = "rank 2 on 127.0.0.1: ended without a word, as a process does that is killed"


@contextmanager
def connected(size: int) -> Iterator[tuple[list[Ranks], list[socket.socket]]]:
    """Ranks in one process, and the sockets that ranks from 1 on hold."""
    others = threading.enumerate()
    ranks = [Ranks(rank, size) for rank in range(size)]
    with socket.create_server(("127.0.0.1", 0)) as server:
        ends = [socket.create_connection(server.getsockname()) for _ in ranks[1:]]
        mine = [server.accept()[0] for _ in ranks[1:]]
    ranks[0].connect(dict(enumerate(mine, start=1)))
    for rank, end in zip(ranks[1:], ends, strict=True):
        rank.connect({0: end})
    try:
        yield ranks, ends
    finally:
        for rank in ranks:
            rank.fail("the test is over", 1)
        # Only the ranks' own: other tests of this process may have left threads that never end.
        for thread in threading.enumerate():
            if thread.daemon and thread not in others:
                thread.join(9)


def on_all(ranks: list[Ranks], call: Callable[[Ranks], Any]) -> list[Any]:
    """What a call returns or raises on every rank, all at once."""

    def one(rank: Ranks) -> Any:
        try:
            return call(rank)
        except RankError as error:
            return f"{error.exit_code} {error}"

    with ThreadPoolExecutor(len(ranks)) as pool:
        return list(pool.map(one, ranks))


def test_every_rank_gets_every_value_in_order() -> None:
    with connected(4) as (ranks, _):
        for turn in range(3):
            values = [[rank, turn, None, "é\n"] for rank in range(4)]
            assert on_all(ranks, lambda r, turn=turn: r.gather([r.rank, turn, None, "é\n"])) == (
                [values] * 4
            )


def test_rank_0_tells_all() -> None:
    with connected(3) as (ranks, _):
        assert on_all(ranks, lambda r: r.broadcast(["token", r.rank])) == [["token", 0]] * 3


def test_alone_answers_itself() -> None:
    assert join() is ALONE
    assert ALONE.gather("mine") == ["mine"]
    assert ALONE.broadcast("mine") == "mine"
    ALONE.check()
    ALONE.fail("nobody hears this", 5)
    assert ALONE.failure(within=60) is None
    ALONE.leave()


@pytest.mark.parametrize("failing", [0, 2])
def test_who_fails_ends_the_others_with_its_reason_and_status(failing: int) -> None:
    with connected(4) as (ranks, _):
        ranks[failing].fail("model.safetensors: No space left on device", 5)
        others = [rank for rank in ranks if rank.rank != failing]
        told = f"rank {failing} on {ranks[0].host}: model.safetensors: No space left on device"
        assert on_all(others, Ranks.barrier) == [f"5 {told}"] * 3
        for rank in others:
            with pytest.raises(RankError, match="No space left"):
                rank.check()


def test_who_is_killed_ends_the_others() -> None:
    with connected(4) as (ranks, ends):
        ends[1].shutdown(socket.SHUT_RDWR)
        others = [ranks[0], ranks[1], ranks[3]]
        assert on_all(others, Ranks.barrier) == [f"6 {ENDED}"] * 3
        assert [str(rank.failure(within=9)) for rank in others] == [ENDED] * 3


def test_the_first_reason_counts() -> None:
    with connected(3) as (ranks, _):
        ranks[1].fail("first", 4)
        assert on_all(ranks[:1], Ranks.barrier) == [f"4 rank 1 on {ranks[0].host}: first"]
        ranks[0].fail("last", 5)
        ranks[2].fail("too late", 5)
        assert str(ranks[0].failure(within=0)).endswith("first")


def test_who_leaves_is_not_missed() -> None:
    with connected(3) as (ranks, ends):
        on_all(ranks, Ranks.leave)
    assert [rank.failure(within=0) for rank in ranks] == [None] * 3
    assert [end.fileno() for end in ends] == [-1, -1]


def test_without_torchruns_store_there_is_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a job that inherits another launch's environment: nobody listens at that port."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    launch = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in (launch | store | run).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("gptoss_convert.machine.introduction._PATIENCE", 0.1)
    child = "import sys; sys.exit(1)"
    monkeypatch.setattr("gptoss_convert.machine.introduction._INTRODUCTION", child)
    with pytest.raises(NetworkError, match=r"rank 1 of 2: no connection: torchrun's store"):
        join()


BUSY = """
import socket, sys, threading, time
from pathlib import Path
from gptoss_convert.machine import ranks
ranks._GRACE = 0.1
with socket.create_server(("127.0.0.1", 0)) as server:
    mine = socket.create_connection(server.getsockname())
    other = server.accept()[0]
me = ranks.Ranks(1, 2)
me.keep_log(Path(sys.argv[1]))
me.connect({0: mine})
threading.Thread(target=ranks._insist, args=(me,), daemon=True).start()
other.close()
time.sleep(60)
"""


def test_a_rank_that_is_busy_with_something_else_ends_all_the_same(tmp_path: Path) -> None:
    words = [sys.executable, "-c", BUSY, tmp_path]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    reason = f"error: {ENDED.replace('rank 2', 'rank 0')}"
    assert done.stderr == f"{reason}\n"
    assert (tmp_path / "rank-00001.log").read_text().splitlines()[1:] == [reason]
    assert done.returncode == 6


SCRIPT = """
import sys
from gptoss_convert.machine.ranks import join, joined
ranks = join()
assert ranks is join() is joined()
assert (ranks.local_rank, ranks.local_size) == (ranks.rank, ranks.size)
assert ranks.gather(ranks.rank ** 2) == [0, 1, 4]
assert ranks.broadcast([ranks.rank]) == [0]
assert "torch" not in sys.modules
ranks.leave()
sys.stdout.write(f"rank {ranks.rank} of {ranks.size} on {ranks.host}\\n")
"""


def test_torchrun_starts_ranks_that_find_one_another(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = torchrun(3, "script.py", folder=tmp_path)
    assert done.status == 0, done.error
    host = socket.gethostname()
    assert sorted(done.output.splitlines()) == [f"rank {n} of 3 on {host}" for n in range(3)]
    assert os.environ.get("TORCHELASTIC_RUN_ID") is None

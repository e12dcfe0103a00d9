"""Several ranks verify as one does: the same report, every byte read once, one reason to end."""

from __future__ import annotations

import json
import math
import socket
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss_convert import convert
from gptoss_convert.compare.arrays import Distance
from gptoss_convert.compare.value_statistics import StepStatistics
from gptoss_convert.compare.values_report import Compared, Element, ExpertDigests, Explained
from gptoss_convert.containers.json_records import from_json, to_json
from gptoss_convert.conversion.options import Options
from gptoss_convert.machine.partition import balanced
from gptoss_convert.synth.synth import synth
from gptoss_convert.witness.metrics import TokenScores
from gptoss_convert.witness.observe import Observed
from gptoss_convert.witness.parity_report import NextTokens, SubBlockError
from gptoss_convert.witness.tokens import TokenSequence
from tests.torchrun import torchrun


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in two formats, and another one."""
    folder = tmp_path_factory.mktemp("tiny")
    synth(folder / "mxfp4")
    synth(folder / "other", seed=5)
    convert(folder / "mxfp4", folder / "megatron", Options(to="megatron"))
    return folder


TOGETHER = """
import json, sys
from gptoss_convert.machine.ranks import ALONE, join
from gptoss_convert.witness import fetch, observe
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions

fetched, batches = [], []
fill, walk = fetch._fill, observe.Pass._walk
fetch._fill = lambda piece, view: fetched.extend(piece) or fill(piece, view)
observe.Pass._walk = lambda self, mine: batches.extend(mine) or walk(self, mine)

def report(source, target, options, ranks):
    found = verify_checkpoints(source, target, VerifyOptions(device="cpu", **options), ranks=ranks)
    summary = found.summary()
    for level in summary["levels"]:
        del level["seconds"]
        level["numbers"] and level["numbers"].pop("gpu_memory_by_rank", None)
    return summary

with open("reports.jsonl", "a") as out:
    ranks = join()
    for source, target, options in json.loads(sys.argv[1]):
        fetched.clear(), batches.clear()
        together = report(source, target, options, ranks)
        work = ranks.gather([sum(run.nbytes for _, run in fetched), len(batches)])
        if ranks.rank == 0:
            fetched.clear()
            alone = report(source, target, options, ALONE)
            read = sum(run.nbytes for _, run in fetched)
            print(json.dumps([together, alone, work, read]), file=out)
    ranks.leave()
"""


def reports(processes: int, folder: Path, *cases: tuple[str, str, dict[str, Any]]) -> list[Any]:
    """For each case what the ranks found together, what rank 0 found alone, who did how much."""
    (folder / "together.py").write_text(TOGETHER)
    (folder / "reports.jsonl").unlink(missing_ok=True)
    done = torchrun(processes, "together.py", json.dumps(cases), folder=folder)
    assert done.status == 0, done.error
    return [json.loads(line) for line in (folder / "reports.jsonl").read_text().splitlines()]


NUMBERS = {"level": "logits", "limits": "float32", "statistics": True}
ORACLE = {"level": "oracle", "sample": 40, "max_length": 1}


@pytest.mark.parametrize(
    ("processes", "cases"),
    [
        (2, [("mxfp4", "megatron", ORACLE), ("mxfp4", "other", NUMBERS)]),
        (4, [("mxfp4", "mxfp4", {}), ("megatron", "other", NUMBERS)]),
    ],
    ids=["2", "4"],
)
def test_ranks_report_what_one_process_reports(
    tiny: Path, processes: int, cases: list[tuple[str, str, dict[str, Any]]]
) -> None:
    same, different = reports(processes, tiny, *cases)
    for (together, alone, work, read), verdict in ((same, True), (different, False)):
        assert json.dumps(together) == json.dumps(alone)
        assert together["same"] is verdict
        assert [level["name"] for level in together["levels"]][:3] == ["header", "values", "logits"]
        assert sum(nbytes for nbytes, _ in work) == read > 0
    assert {nbytes for nbytes, _ in different[2][1:]} == {0}  # one reads for all
    assert all(batches for _, batches in different[2])
    values, logits = different[0]["levels"][1:]
    assert len(values["numbers"]["differences"]) > 20
    assert logits["numbers"]["overall"]["kl_max"] > 0.1
    if processes == 2:
        assert {one["settled"] > 0 for one in same[0]["levels"][3]["numbers"].values()} == {True}


def test_rank_0_speaks_for_all(tiny: Path) -> None:
    command = ("-m", "gptoss_convert", "verify", "mxfp4", "other", "--level", "values")
    done = torchrun(2, *command, "--json", "found.json", "--junit", "found.xml", folder=tiny)
    assert done.status == 1
    assert done.output.count("different: ") == 1
    assert done.output.count("values  different") == 1
    assert json.loads((tiny / "found.json").read_text())["same"] is False
    assert (tiny / "found.xml").exists()


ENDING = """
import os, signal
from gptoss_convert.__main__ import main
from gptoss_convert.errors import DiskError
from gptoss_convert.witness import observe

note = observe._Batch.note

def noted(self, ours, *words):
    if ours.layer == 1 and os.environ["RANK"] == os.environ["ENDS"]:
        if os.environ["RANK"] == "0":
            raise DiskError("model.safetensors: Input/output error")
        os.kill(os.getpid(), signal.SIGKILL)
    note(self, ours, *words)

observe._Batch.note = noted
main()
"""


@pytest.mark.parametrize(
    ("ends", "reason", "lines"),
    [
        ("0", "model.safetensors: Input/output error", 2),
        ("1", "ended without a word, as a process does that is killed", 1),
    ],
    ids=["fails", "is killed"],
)
def test_the_others_end_with_a_rank_that(tiny: Path, ends: str, reason: str, lines: int) -> None:
    (tiny / "ending.py").write_text(ENDING)
    words = ("verify", "mxfp4", "megatron", "--device", "cpu", "--json", "never.json")
    done = torchrun(2, "ending.py", *words, folder=tiny, more={"ENDS": ends})
    assert done.status == 1
    said = [line for line in done.error.splitlines() if line.startswith("error: ")]
    assert f"error: rank {ends} on {socket.gethostname()}: {reason}" in said
    assert len(said) == lines
    assert done.output == ""
    assert not (tiny / "never.json").exists()


def test_work_is_dealt_evenly_and_to_all() -> None:
    for ranks, count in product((1, 2, 3, 8), (0, 1, 7, 100)):
        costs = [float((n * 7919) % 101 + 1) for n in range(count)]
        dealt = balanced(costs, ranks)
        held = [
            sum(c for c, rank in zip(costs, dealt, strict=True) if rank == r) for r in range(ranks)
        ]
        assert max(held) <= sum(costs) / ranks + max(costs, default=0)
        assert count < ranks or min(held) > 0


def test_what_a_rank_saw_arrives_without_a_bit_lost() -> None:
    column = torch.tensor([0.1, float("nan"), 5e-324], dtype=torch.float64)
    seen = Observed(
        (TokenSequence("text-3-0", (1, 2, 3)),),
        (SubBlockError(0, "attention", math.inf, "text-3-0", 2, math.inf, 0.1, 1 / 3),),
        (2,),
        (torch.tensor([[1, 0, 11], [1, 2, 9]]),),
        (True,),
        TokenScores(*(column * n for n in range(1, 9))),
        (NextTokens("prompt", ((3, 0.1), (4, 0.2)), ((4, 0.3), (3, 1e-17))),),
    )
    found = Observed.of(seen.sequences, json.loads(json.dumps(seen.plain())))
    assert (found.errors, found.same_choices) == (seen.errors, seen.same_choices)
    assert found.once == seen.once
    assert found.next_tokens == seen.next_tokens
    assert torch.equal(found.hits[0], seen.hits[0])
    for name, values in vars(seen.scores).items():
        theirs = getattr(found.scores, name)
        assert torch.equal(theirs.view(torch.int64), values.view(torch.int64))


def test_what_a_rank_compared_arrives_whole() -> None:
    element = Element((3, 1), 0.1, -float("inf"), 7)
    piece = ExpertDigests(2, 5, ((0, 4), (1, 3)), b"\x00" * 16, b"\xff" * 16)
    distances = {-1: Distance(9, 1, 0, 0.1, 1e300), 3: Distance(2, 0, 2, 1 / 3)}
    statistics = StepStatistics(3, (0, 7), ())
    for one in (
        Compared(4, 9, element, element, 2**64 - 1, 1, statistics),
        Compared(5, 0, None, None, 0, 0),
        Explained(7, "down.weight", 2, "transposed", (piece,), distances),
        Explained(8, "norm.weight", None, None, ()),
    ):
        assert from_json(type(one), json.loads(json.dumps(to_json(one)))) == one

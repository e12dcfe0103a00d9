"""The job examples are sound, and the torchrun line in each converts."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.synth.synth import synth
from tests.killing import contents
from tests.torchrun import ROOT

EXAMPLES = ROOT / "docs" / "examples"
TOOLS = Path(sys.executable).parent


def documents() -> Mapping[str, Any]:
    """The objects of the Kubernetes example, by kind."""
    text = (EXAMPLES / "kubernetes.yaml").read_text()
    return {document["kind"]: document for document in yaml.safe_load_all(text)}


def container() -> Mapping[str, Any]:
    (only,) = documents()["Job"]["spec"]["template"]["spec"]["containers"]
    return only


def script_of(name: str) -> str:
    if name == "kubernetes":
        (script,) = container()["args"]
        return f"#!/bin/bash\n{script}"
    path = ROOT / "tests" / "two_hosts.sh" if name == "two_hosts" else EXAMPLES / "slurm.sh"
    return path.read_text()


@pytest.mark.parametrize("name", ["slurm", "kubernetes", "two_hosts"])
@pytest.mark.parametrize("checker", [["bash", "-n"], [TOOLS / "shellcheck", "-"]])
def test_scripts_are_sound(name: str, checker: list[str]) -> None:
    done = subprocess.run(
        checker, input=script_of(name), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_pods_of_the_job_find_one_another() -> None:
    job, service = documents()["Job"], documents()["Service"]
    name, spec = job["metadata"]["name"], job["spec"]
    pod = spec["template"]["spec"]
    environment = {entry["name"]: entry["value"] for entry in container()["env"]}
    assert service["spec"]["selector"] == {"job-name": name}
    assert service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"]
    assert environment["FIRST"] == f"{name}-0.{pod['subdomain']}"
    assert spec["completionMode"] == "Indexed"
    assert int(environment["NODES"]) == spec["completions"] == spec["parallelism"]
    (mount,), (volume,) = container()["volumeMounts"], pod["volumes"]
    assert mount["name"] == volume["name"]
    for place in ("SOURCE", "TARGET"):
        assert environment[place].startswith(f"{mount['mountPath']}/")


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, dict[str, bytes]]:
    """A directory with a tiny `source`, and what one process makes of it."""
    synth(tmp_path / "source", layers=1)
    run(plan(tmp_path / "source", tmp_path / "expected", Options("hf", "bf16")))
    return tmp_path, contents(tmp_path / "expected")


def run_script(script: str, *words: str, folder: Path, more: Mapping[str, str]) -> str:
    """What a job's script prints to stdout, on this machine alone with two ranks."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = {
        **os.environ,
        "PATH": f"{folder}{os.pathsep}{TOOLS}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "PORT": str(port),
        **more,
    }
    done = subprocess.run(
        ["bash", "-c", script, "job", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_slurm_job_converts(made: tuple[Path, dict[str, bytes]]) -> None:
    folder, expected = made
    stand_ins = {
        "scontrol": '[ "$*" = "show hostnames 127.0.0.1" ] && printf "127.0.0.1\\nanother\\n"',
        "srun": '[ "$1" = --kill-on-bad-exit=1 ] && shift && exec "$@"',
    }
    for name, body in stand_ins.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "127.0.0.1", "SLURM_NNODES": "1", "SLURM_JOB_ID": "7"}
    words = (str(folder / "source"), "target", "--to", "hf", "--dtype", "bf16", "--json")
    more = slurm | {"RANKS_PER_NODE": "2"}
    printed = run_script(script_of("slurm"), *words, folder=folder, more=more)
    assert yaml.safe_load(printed)["target"]["path"] == "target"
    assert contents(folder / "target") == expected
    assert len([*(folder / "ranks-7").iterdir()]) == 2


def test_the_kubernetes_job_converts(made: tuple[Path, dict[str, bytes]]) -> None:
    folder, expected = made
    script = script_of("kubernetes")
    assert script.count("--to megatron") == 1
    given = {entry["name"]: entry["value"] for entry in container()["env"]}
    here = {"NODES": "1", "RANKS_PER_NODE": "2", "FIRST": "127.0.0.1"}
    here |= {"SOURCE": str(folder / "source"), "TARGET": "target"}
    assert set(here) == set(given)
    run_script(
        script.replace("--to megatron", "--to hf --dtype bf16"),
        folder=folder,
        more=here | {"JOB_COMPLETION_INDEX": "0"},
    )
    assert contents(folder / "target") == expected

"""Completion: what the scripts for bash, zsh and fish ask the program, and what it answers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from gptoss_convert.cli.main import COMPLETE, cli

PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"


def run(words: list[str], variables: Mapping[str, str]) -> str:
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": PATH, "TERM": "dumb", **variables},
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode == 0
    return done.stdout


ASKED = {
    "": sorted(cli.commands),
    "ins": ["inspect"],
    "convert a b --to ": ["hf", "megatron", "openai"],
    "convert a b --to me": ["megatron"],
    "convert a b --max-s": ["--max-shard-size"],
    "completion ": ["bash", "fish", "zsh"],
}


@pytest.mark.parametrize("line", ASKED)
def test_the_program_answers_every_shell(line: str) -> None:
    words, current = f"gptoss-convert {line}".rsplit(" ", 1)
    asked = {"COMP_WORDS": f"{words} {current}", "COMP_CWORD": str(len(words.split()))}
    found = run(["gptoss-convert"], {**asked, COMPLETE: "bash_complete"})
    assert sorted(row.split(",")[1] for row in found.splitlines()) == ASKED[line]
    found = run(["gptoss-convert"], {**asked, COMPLETE: "zsh_complete"})
    assert sorted(found.splitlines()[1::3]) == ASKED[line]
    found = run(["gptoss-convert"], {**asked, "COMP_CWORD": current, COMPLETE: "fish_complete"})
    assert set(ASKED[line]) <= {part for row in found.split() for part in row.split(",")}


def test_paths_are_left_to_the_shell() -> None:
    asked = {"COMP_WORDS": "gptoss-convert inspect gpt", "COMP_CWORD": "2"}
    assert run(["gptoss-convert"], {**asked, COMPLETE: "bash_complete"}) == "file,gpt\n"


SHELLS = {
    "bash": """
        eval "$(gptoss-convert completion bash)"
        COMP_WORDS=(gptoss-convert convert a b --to m) COMP_CWORD=5
        $(complete -p gptoss-convert | sed 's/.*-F \\([^ ]*\\).*/\\1/') gptoss-convert
        printf '%s\\n' "${COMPREPLY[@]}"
    """,
    "zsh": """
        compdef() { }
        _describe() { print -l -- ${(P)${@[-2]}}; }
        compadd() { print -l -- ${(P)${@[-1]}}; }
        eval "$(gptoss-convert completion zsh)"
        words=(gptoss-convert convert a b --to m) CURRENT=6
        _gptoss_convert_completion
    """,
    "fish": """
        gptoss-convert completion fish | source
        complete --do-complete 'gptoss-convert convert a b --to m'
    """,
}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_scripts_complete_in_the_shells_themselves(shell: str, tmp_path: Path) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    options = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    found = run([shell, *options, "-c", SHELLS[shell]], {"HOME": str(tmp_path)})
    assert found.split() == ["megatron"]

"""The recipes for Megatron, line by line as docs/recipes.md has them. No tests here."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

from click.testing import CliRunner

from gptoss_convert.cli.main import cli

ROOT = Path(__file__).parent.parent


def commands(section: str, step: str) -> list[str]:
    """The commands of one step of a recipe, without what they print."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    part = text.partition(f"\n## {section}")[2].partition(f"\n**{step}")[2]
    block = part.partition("```console\n")[2].partition("```")[0]
    return re.findall(r"^\$ (.*)$", block, re.MULTILINE)


def run(lines: list[str]) -> list[str]:
    """Run commands in the working directory, each to status 0; what each printed."""
    said: list[str] = []
    for line in lines:
        program, *words = shlex.split(line)
        if program == "gptoss-convert":
            done = CliRunner().invoke(cli, words)
            assert done.exit_code == 0, (line, done.output, done.exception)
            said.append(done.stdout)
        else:
            ended = subprocess.run(line, shell=True, check=True, capture_output=True, text=True)
            said.append(ended.stdout)
    return said


def way_back(section: str) -> list[str]:
    """The last step, but for the lines that stand in for the training."""
    made, removed, *rest = commands(section, "3. Come back")
    assert made.startswith("gptoss-convert convert tuned ") and removed.startswith("rm -r ")
    verify = [line for line in rest if line.startswith("gptoss-convert verify ")]
    assert rest[-1:] == verify and not any("--config" in line for line in rest)
    return rest

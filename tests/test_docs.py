"""Every command in the documentation runs, and every option and exit status is documented.

The convention is stated in CONTRIBUTING.md, "Commands in the documentation are tested".
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from itertools import takewhile
from pathlib import Path
from typing import Any

import click
import pytest

from gptoss_convert.cli.main import cli
from gptoss_convert.conversion.options import Options
from gptoss_convert.errors import EXIT_CODES

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
ALL_PAGES = sorted({*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")})
TINY = "gpt-oss-20b"
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\(([^)#\s]+)")
_ROW = re.compile(r"^\| (`-.*?) \| (.*?) \|", re.MULTILINE)
_OPTION = re.compile(r"`(--?[a-z-]+|-[A-Z])`")
_ANY = "..."


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    line: int
    language: str
    text: str


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for match in _FENCE.finditer(text):
        yield Block(text.count("\n", 0, match.start()) + 2, match[1], match[2])


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """Each command of a console block with the output shown below it."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        command, _, output = part.partition("\n")
        yield command, output


# Lines that a command prints where it takes longer than a page's reader would wait.
_PROGRESS = re.compile(r"^\S.*  \d+%  \d+/\d+ steps  .*  eta \d+ s\n", re.MULTILINE)


def matches(expected: str, found: str) -> bool:
    """Whether the output is the expected one, `...` standing for any text."""
    pattern = ".*".join(re.escape(part) for part in expected.strip().split(_ANY))
    return re.fullmatch(pattern, found.strip(), re.DOTALL) is not None


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / TINY
    run_command(f"gptoss-convert synth {folder}", folder.parent)
    return folder


def run_command(command: str, folder: Path) -> str:
    """Output and errors of a shell command that must end with status 0."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command,
        shell=True,
        cwd=folder,
        env={**os.environ, "PATH": path, "COLUMNS": "100"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout}"
    return _PROGRESS.sub("", done.stdout)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_does_what_the_page_shows(
    page: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny, tmp_path / TINY)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks_of(page):
        if block.language == "python":
            place = "\n" * (block.line - 1) + block.text
            exec(compile(place, str(page), "exec"), names)
        for command, expected in commands_of(block) if block.language == "console" else ():
            found = run_command(command, tmp_path)
            assert not expected or matches(expected, found), (
                f"{page.name}:{block.line}: $ {command}\nexpected:\n{expected}\nfound:\n{found}"
            )


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_commands_that_are_only_shown_parse(page: Path) -> None:
    for block in blocks_of(page):
        assert block.language in {"console", "python", "sh", "text", "toml", ""}, (page, block)
        for line in block.text.splitlines() if block.language == "sh" else ():
            parse_line(line)


def parse_line(line: str) -> bool:
    """Parse a shell's line that runs this program, up to a redirection; whether it is one."""
    words = takewhile(lambda word: word not in {">", "|"}, shlex.split(line, comments=True))
    program, *words = [*words, ""]
    if program == "gptoss-convert":
        parse(words[:-1])
    return program == "gptoss-convert"


def parse(words: list[str]) -> None:
    """Parse a command line as far as possible without running it."""
    if words and words[0] in cli.commands:
        cli.commands[words[0]].make_context(words[0], words[1:], resilient_parsing=False)
    else:
        with pytest.raises(click.exceptions.Exit):
            cli.make_context("gptoss-convert", words)


def section(command: str) -> str:
    text = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    return text.partition(f"\n## {command}\n")[2].partition("\n## ")[0]


def rows(command: str) -> dict[str, tuple[str, str]]:
    """By long option: the first cell of its row in cli.md and the default in the second."""
    found = {}
    for first, default in _ROW.findall(section(command)):
        options = _OPTION.findall(first)
        found[options[-1]] = (first, default)
    return found


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_option_is_documented_with_its_choices_and_default(command: str) -> None:
    documented = rows(command)
    options = [p for p in cli.commands[command].params if isinstance(p, click.Option)]
    assert set(documented) == {"--help", *(max(option.opts, key=len) for option in options)}
    for option in options:
        first, default = documented[max(option.opts, key=len)]
        assert set(_OPTION.findall(first)) == {*option.opts, *option.secondary_opts}
        if isinstance(option.type, click.Choice):
            assert first.rpartition("` ")[2] == ", ".join(option.type.choices)
        assert default == default_of(option) or default_of(option) is None, option.name


def default_of(option: click.Option) -> str | None:
    """The default as cli.md writes it; None where the page may say it in words."""
    default: Any = option.to_info_dict()["default"]
    if option.required:
        return "required"
    if option.is_flag:
        return "off"
    return default if isinstance(default, str) else str(default) if type(default) is int else None


@pytest.mark.parametrize("page", ["README.md", "docs/errors.md"])
def test_every_exit_status_is_documented(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for code, meaning in EXIT_CODES.items():
        assert f"\n| {code} | {meaning} |" in text


def test_every_field_of_options_is_documented() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(\w+)` \| (\S+) \|", text, re.MULTILINE)
    assert [name for name, _ in documented] == [field.name for field in fields(Options)]
    defaults = {f.name: f.default for f in fields(Options) if f.name != "to"}
    shown = {name: text.strip("`") for name, text in documented if name != "to"}
    assert {name: eval(text) for name, text in shown.items()} == defaults


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in _LINK.findall(page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The fragments that lead to the headings of a page, made as GitHub makes them."""
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}


@pytest.mark.parametrize("page", ALL_PAGES, ids=lambda page: page.name)
def test_links_to_a_heading_lead_to_one(page: Path) -> None:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    for path, fragment in re.findall(r"\]\(([^)#\s:]*)#([^)\s]+)\)", text):
        target = page.parent / path if path else page
        assert fragment in anchors(target), f"{page.name}: {path}#{fragment}"


def test_every_page_is_reachable_from_the_readme() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert f"(docs/{page.name})" in text, page.name


def test_every_module_stands_in_the_architecture() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^  (\w+(?:\.py|/)) ", text, re.MULTILINE))
    package = ROOT / "gptoss_convert"
    modules = {path.name for path in package.glob("*.py")} - {"__init__.py", "version.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert described == {name for name in modules if not name.endswith("_kernels.py")} | folders


def test_an_output_pattern_stands_for_the_whole_output() -> None:
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n")
    assert matches("took ... s", "took 1.5 s\n")
    assert not matches("a\n", "a\nb\n")
    assert not matches("a...c", "a b d")
    late = "comparing  22%  4/71 steps  0.0/0.0 GB  0 MB/s  eta 20 s\nsame: all\n"
    assert _PROGRESS.sub("", late) == "same: all\n"

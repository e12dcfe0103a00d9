"""Pages: plain text that no terminal decides, tables that fit each terminal, folded layers."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptoss_convert.containers import Chunk
from gptoss_convert.layouts.folding import fold_tensors
from gptoss_convert.show import pages, report
from gptoss_convert.show.pages import Facts, Grid
from gptoss_convert.synth.synth import synth

_ESCAPE = re.compile(r"\x1b\[[0-9;]*m")
VARIABLES = ("NO_COLOR", "FORCE_COLOR", "TERM", "COLUMNS", "COLORTERM")
MLP = "model.layers.{0..23}.mlp."
GROUPS = [
    {"name": name, "count": count, "dtype": "BF16", "shape": shape, "bytes": 10**9}
    for name, count, shape in (
        ("model.embed_tokens.weight", 1, [201088, 2880]),
        (f"{MLP}router.weight", 24, [32, 2880]),
        (f"{MLP}experts.gate_up_proj_blocks", 24, [32, 5760, 90, 16]),
        ("lm_head.weight", 1, [201088, 2880]),
    )
]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


def test_plain_text_is_aligned_and_ends_in_no_spaces() -> None:
    table = Grid(("level", "time", "what"), [("a", "1 s", "x\ny"), ("bcdefg", "10 s", "")])
    page = ["head", "", Facts({"path": "p", "format": "f"}), table]
    assert pages.plain(page).split("\n") == [
        *("head", "", "path    p", "format  f"),
        *("level   time  what", "a       1 s   x", "              y", "bcdefg  10 s"),
    ]
    flush = Grid(("n", "bytes"), [("a", "1 B"), ("b", "10 kB")], right=frozenset(("bytes",)))
    assert pages.plain([flush]).split("\n") == ["n  bytes", "a    1 B", "b  10 kB"]


def test_plain_tables_hold_whole_names() -> None:
    lines = pages.plain([report.tensors(GROUPS)]).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [str(group["name"]) for group in GROUPS]


def styled(page: pages.Page, width: int, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    return _ESCAPE.sub("", pages.styled(page)).splitlines()


def test_a_terminal_shows_once_what_names_begin_with(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = styled([report.tensors(GROUPS)], 80, monkeypatch)
    assert [line.split("  ")[0] for line in lines[1:3]] == [
        *("model.embed_tokens.weight", "model.layers.{0..23}.")
    ]
    row = "  mlp.experts.gate_up_proj_blocks     24  BF16   32 x 5760 x 90 x 16  1.00 GB"
    assert lines[4] == row


@pytest.mark.parametrize(
    ("width", "columns"),
    [
        (120, ["tensor", "count", "dtype", "shape", "bytes"]),
        (80, ["tensor", "count", "dtype", "shape", "bytes"]),
        (70, ["tensor", "dtype", "shape", "bytes"]),
        (52, ["tensor", "dtype", "bytes"]),
    ],
)
def test_a_narrow_terminal_loses_columns_before_names(
    monkeypatch: pytest.MonkeyPatch, width: int, columns: list[str]
) -> None:
    lines = styled([report.tensors(GROUPS)], width, monkeypatch)
    assert lines[0].split() == columns
    assert max(map(len, lines)) <= width
    assert any("experts.gate_up_proj_blocks" in line for line in lines)


def test_nothing_is_lost_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    page = [Facts({"path": "/" + "x" * 90}), Grid(("level", "what"), [("a", "word " * 30)])]
    lines = styled(page, 40, monkeypatch)
    assert max(map(len, lines)) <= 40
    text = "".join(lines)
    assert (text.count("x"), text.count("word")) == (90, 30)


def test_no_name_can_colour_or_break_a_page() -> None:
    page = ["note: a\x1b[31m\nb", Facts({"path": "p\x1b]0;title\x07"})]
    for text in (pages.plain(page), _ESCAPE.sub("", pages.styled(page))):
        assert len(text.splitlines()) == 2
        assert "\x1b" not in text
        assert "\\x1b[31m\\nb" in text


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "variables", "expected"),
    [
        (io.StringIO(), {}, False),
        (Terminal(), {}, True),
        (Terminal(), {"TERM": "dumb"}, False),
        (Terminal(), {"NO_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": "1"}, True),
        (io.StringIO(), {"FORCE_COLOR": ""}, False),
        (io.StringIO(), {"FORCE_COLOR": "1", "TERM": "dumb"}, False),
    ],
)
def test_streams_and_variables_decide(
    monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, variables: dict[str, str], expected: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert pages.is_styled(stream) is expected
    assert ("\x1b" in pages.render(["same: yes"], stream)) is expected


def test_no_color_leaves_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "\x1b[1;32m" in pages.styled(["same: yes"])
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1m" in pages.styled(["same: yes"])
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", pages.styled(["same: yes"]))


def from_terminal(*words: str) -> Iterator[str]:
    """The lines that a command prints on a terminal."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "gptoss_convert", *words]
    with subprocess.Popen(command, stdout=theirs, stderr=theirs):
        os.close(theirs)
        text = b""
        try:
            while part := os.read(ours, 1 << 16):
                text += part
        except OSError:  # The end, as Linux tells it.
            pass
    os.close(ours)
    yield from text.decode().splitlines()


def test_commands_print_a_table_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    synth(tmp_path / "tiny")
    lines = [_ESCAPE.sub("", line) for line in from_terminal("inspect", str(tmp_path / "tiny"))]
    assert "model.layers.{0..3}." in [line.strip() for line in lines]
    assert max(map(len, lines)) <= 80
    (line,) = from_terminal("inspect", str(tmp_path / "nowhere"))
    assert line.startswith("\x1b[31m\x1b[1merror\x1b[0m: ")


def test_tensors_fold_by_dtype_and_shape_in_the_order_given() -> None:
    def chunk(name: str, shape: tuple[int, ...], start: int = 0) -> Chunk:
        return Chunk(name, "BF16", shape, (start,) * len(shape), shape, "file", 0)

    chunks = [
        *(chunk(f"layers.{layer}.w", (2, 3)) for layer in (0, 1, 3)),
        *(chunk("layers.0.w", (2, 3), 1), chunk("layers.2.w", (3, 2)), chunk("end", (5,))),
        chunk("start", (7,)),
    ]
    found = fold_tensors(chunks, ["start", *(f"layers.{i}.w" for i in range(4))])
    assert [(one.name, one.count, one.shape, one.nbytes) for one in found] == [
        ("start", 1, (7,), 14),
        ("layers.{0..1,3}.w", 3, (2, 3), 36),
        ("layers.2.w", 1, (3, 2), 12),
        ("end", 1, (5,), 10),
    ]

"""Reports: one page that asks for nothing, the same facts as Markdown, nothing unescaped."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptoss_convert import convert, verify_checkpoints
from gptoss_convert.conversion.options import Options
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.show.report_page.axes import LogLane, spaced, stretches
from gptoss_convert.show.report_page.content import page_of
from gptoss_convert.show.report_page.document import (
    NONE,
    Code,
    Facts,
    Figure,
    Listing,
    ReportPage,
    Table,
    number,
    share,
)
from gptoss_convert.show.report_page.figures import loads, sqnr_borders
from gptoss_convert.show.report_page.html import html
from gptoss_convert.show.report_page.markdown import escaped, markdown
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.result import VerifyOptions

Summary = dict[str, Any]
DOWN = "model.layers.1.mlp.experts.down_proj"
VOID = {"meta", "link", "br", "img", "hr", "input"}


def edited(source: Path, copied: Path, change: Any) -> Path:
    """A copy in which the BF16 bits of one tensor are others."""
    shutil.copytree(source, copied)
    chunk = next(one for one in open_checkpoint(copied).chunks if one.tensor == DOWN)
    path, shape = copied / chunk.file, chunk.extent
    bits: Any = np.memmap(path, np.uint16, "r+", offset=chunk.offset, shape=shape)
    bits[...] = change(bits.copy())
    bits.flush()
    return copied


def nudged(bits: Any) -> Any:
    """A few values of one expert moved a little, so that MXFP4 cannot hold them."""
    bits[3, 5:40, 7:60] += 1
    return bits


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, the same in BF16, two experts exchanged, other numbers, those as MXFP4."""
    made = tmp_path_factory.mktemp("pages")
    synth(made / "mxfp4", layers=2)
    convert(made / "mxfp4", made / "bf16", Options(to="hf", dtype="bf16"))
    edited(made / "bf16", made / "wrong", lambda bits: bits[[0, 2, 1, *range(3, 8)]])
    edited(made / "bf16", made / "tuned", nudged)
    convert(
        made / "tuned",
        made / "lossy",
        Options(to="hf", dtype="mxfp4", lossy="nearest", scale_rule="floor"),
    )
    return made


def verified(source: Path, target: Path, **options: Any) -> Summary:
    chosen = VerifyOptions(device="cpu", statistics=True, sample=1, **options)
    return verify_checkpoints(source, target, chosen).summary()


@pytest.fixture(scope="module")
def same(folder: Path) -> Summary:
    return verified(folder / "mxfp4", folder / "bf16")


@pytest.fixture(scope="module")
def different(folder: Path) -> Summary:
    return verified(folder / "mxfp4", folder / "wrong")


@pytest.fixture(scope="module")
def lossy(folder: Path) -> Summary:
    return verified(folder / "tuned", folder / "lossy", level="values")


@pytest.fixture(scope="module")
def rendered(
    same: Summary, different: Summary, lossy: Summary
) -> dict[str, tuple[ReportPage, str]]:
    """Each page and its HTML."""
    named = {"same": same, "different": different, "lossy": lossy}
    made = {name: page_of(one, "gptoss-convert verify a b") for name, one in named.items()}
    return {name: (page, html(page)) for name, page in made.items()}


class Parsed(HTMLParser):
    """The page's tags, checked to be closed in order, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open and "svg" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def texts_of(page: ReportPage) -> Iterator[str]:
    """Every text of a page that both renderings must show."""
    yield from (page.verdict, *page.reasons)
    for title, facts in page.sides:
        yield title
        yield from (text for row in facts.rows for text in row)
    yield from (text for step in page.steps for text in (step.name, step.answer, step.text))
    for section in page.sections:
        yield from (section.title, section.lead)
        for part in section.parts:
            table = part.numbers if isinstance(part, Figure) else part
            if isinstance(part, Figure):
                yield from (part.title, part.note)
            if isinstance(table, Table):
                yield from (column.title for column in table.columns)
            if isinstance(table, Table | Facts):
                yield from (text for row in table.rows for text in row)
            if isinstance(table, Listing):
                yield from table.items


@pytest.mark.parametrize("name", ["same", "different", "lossy"])
def test_html_and_markdown_say_the_same(
    name: str, rendered: dict[str, tuple[ReportPage, str]]
) -> None:
    page, made = rendered[name]
    found, text = Parsed(made).text, markdown(page)
    facts = [*texts_of(page)]
    assert len(facts) > 100
    for fact in facts:
        assert " ".join(fact.split()) in found
        assert escaped(fact) in text


@pytest.mark.parametrize(
    ("name", "titles"),
    [
        ("same", ["Where do they part?", "Does it depend on the position?",
                  "Which experts were reached?", "How are the MXFP4 scales spread?",
                  "How far apart, in numbers?", "Which tokens were used?", "Which limits?",
                  "Which fingerprints?", "How was it run?"]),
        ("different", ["Where do they part?", "Does it depend on the position?",
                       "Which experts were reached?", "How much of each expert is left?",
                       "How are the MXFP4 scales spread?", "Which tensors are worst?",
                       "What did each level find?", "How far apart, in numbers?",
                       "Which tokens were used?", "Which limits?", "Which fingerprints?",
                       "How was it run?"]),
        ("lossy", ["How much of each expert is left?", "How are the MXFP4 scales spread?",
                   "Which tensors are worst?", "What did each level find?",
                   "Which fingerprints?", "How was it run?"]),
    ],
)  # fmt: skip
def test_every_question_has_its_section(
    name: str, titles: list[str], rendered: dict[str, tuple[ReportPage, str]]
) -> None:
    page, _ = rendered[name]
    assert [section.title for section in page.sections] == titles


def test_the_verdict_comes_first_in_words(same: Summary, different: Summary) -> None:
    page = page_of(same, None)
    assert (page.verdict, page.tone) == ("The same model", "same")
    elements = same["levels"][1]["numbers"]["elements"]
    assert page.reasons[0] == f"Every one of {elements:,} values is equal, bit by bit."
    assert page.reasons[1].startswith("Both compute the same: no logit differs")
    page = page_of(different, None)
    assert (page.verdict, page.tone) == ("Different weights", "different")
    assert "exchanged: expert 1 holds expert 2 of SOURCE" in page.reasons[1]
    assert page.reasons[3].startswith("They part after layer 1, experts")
    assert [step.answer for step in page.steps] == ["same", "different", "different", "not run"]


def test_a_lossy_quantisation_is_told_from_a_mistake(lossy: Summary, different: Summary) -> None:
    assert "what a lossy quantisation leaves" in page_of(lossy, None).reasons[1]
    assert not any("lossy" in reason for reason in page_of(different, None).reasons)


def test_values_that_differ_within_limits_are_called_so(folder: Path) -> None:
    found = verified(folder / "tuned", folder / "lossy", limits="bfloat16")
    assert found["same"]
    page = page_of(found, None)
    assert (page.verdict, page.tone) == ("The same within the limits “bfloat16”", "within")
    allowed = number(found["levels"][2]["numbers"]["limits"]["max_delta"])
    assert page.reasons[2].endswith(f"; the limits “bfloat16” allow {allowed}.")


def test_other_numbers_end_at_the_header(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "bf16", tmp_path / "other")
    config = tmp_path / "other" / "config.json"
    config.write_text(config.read_text().replace('"sliding_window": 16', '"sliding_window": 15'))
    page = page_of(verified(folder / "bf16", tmp_path / "other"), None)
    assert page.verdict == "Different models"
    assert page.reasons[0] == "sliding_window is 16 in SOURCE, 15 in TARGET."
    assert [step.answer for step in page.steps] == ["different", *["not run"] * 3]


@pytest.mark.parametrize("name", ["same", "different", "lossy"])
def test_the_page_holds_all_it_shows(
    name: str, rendered: dict[str, tuple[ReportPage, str]]
) -> None:
    _, text = rendered[name]
    parsed = Parsed(text)
    assert not re.search(r"https?:|//[a-z]|@import|<script|<img|<link|<iframe", text)
    assert re.findall(r"url\(([^#)][^)]*)\)", text) == []
    ids = {found for _, found_in in parsed.tags if (found := found_in.get("id"))}
    assert len(ids) == len([1 for _, found_in in parsed.tags if found_in.get("id")])
    for reference in re.findall(r"url\(#([^)]+)\)", text):
        assert reference in ids
    for _, attributes in parsed.tags:
        for key in ("href", "src", "action", "data"):
            assert (attributes.get(key) or "#").startswith("#")
    assert not re.search("#0[12]00[0-9a-f]{2}", text), "a stand-in of a colour is left"
    variables = set(re.findall(r"var\((--[\w-]+)\)", text))
    assert variables <= set(re.findall(r"(--[\w-]+):", text))


HOSTILE = "x<script>alert(1)</script>`|\n# a\x1b[31m\u202e\"'&{{ 7 * 7 }}"


def hostile(found: Any) -> Any:
    """The same data with every name and path replaced."""
    if isinstance(found, dict):
        return {
            key: HOSTILE if key in {"path", "sequence", "name"} and isinstance(value, str)
            and value not in {"header", "values", "logits", "lossless"} else hostile(value)
            for key, value in found.items()
        }  # fmt: skip
    if isinstance(found, list | tuple):
        tensors = all(isinstance(one, str) for one in found)
        return [HOSTILE if tensors else hostile(one) for one in found]
    return found


def test_names_and_paths_from_files_are_only_text(different: Summary) -> None:
    page = page_of(hostile(copy.deepcopy(different)), HOSTILE)
    text = html(page)
    assert "<script" not in text
    assert "\x1b" not in text and "\u202e" not in text
    assert "{{ 7 * 7 }}" in text
    shown = "x<script>alert(1)</script>`|\\n# a\\x1b[31m\\u202e\"'&"
    assert Parsed(text).text.count(shown) > 10
    lines = markdown(page).splitlines()
    assert not any(line.startswith("# a") for line in lines)
    assert all(line.isprintable() for line in lines)
    outside = re.sub(r"``.*?`` ?|\\.", "", "\n".join(lines))
    assert "<script" not in outside
    rows = [line for line in lines if line.startswith("| 1 | ") and "`` x" in line]
    assert rows
    assert {len(re.findall(r"(?<!\\)\|", row)) for row in rows} == {11}


def test_code_in_markdown_ends_where_it_ends() -> None:
    assert escaped(Code("a`b``c|d")) == "``` a`b``c\\|d ```"
    assert escaped("a*b_c|<d>") == r"a\*b\_c\|\<d\>"


def test_numbers_never_claim_what_is_not_exact() -> None:
    assert [share(n) for n in (0, 1, 0.99999, 1e-9, 0.5)] == [
        "0 %", "100 %", "> 99.99 %", "< 0.01 %", "50.00 %"]  # fmt: skip
    assert [number(n) for n in (0.0, 3, 1234567, 1.5e-7, float("inf"), float("nan"))] == [
        "0", "3", "1,234,567", "1.5e-07", "∞", NONE]  # fmt: skip


def test_a_log_axis_has_lanes_for_zero_and_infinity() -> None:
    lane = LogLane.of([0.0, 2e-5, 3e-2, float("inf")])
    assert (lane.low, lane.high, lane.zeros, lane.infinities) == (-5, -1, True, True)
    assert lane.at(0.0) == -6 < lane.at(2e-5) < lane.at(3e-2) < lane.at(float("nan")) == 0


def test_maps_tell_never_from_seldom_and_cut_what_nobody_uses() -> None:
    assert loads([[0, 1, 10, 10, 19, 80]]) == [[0, 1, 3, 3, 3, 6]]
    assert stretches([0, 108, 109, 111]) == [0, 2, 3, 5]
    assert spaced(32) == [0, 4, 8, 12, 16, 20, 24, 28]
    assert sqnr_borders([18.2, 24.9]) == [18, 19, 20, 21, 22, 23, 24]
    assert sqnr_borders([-100.0, 20.0]) == [-100, -80, -60, -40, -20, 0, 20]


def test_the_command_writes_both_and_says_where(folder: Path, tmp_path: Path) -> None:
    where = tmp_path / "a" / "b"
    words = ["verify", "mxfp4", "wrong", "--level", "values", "--report", str(where)]
    line = [sys.executable, "-m", "gptoss_convert", *words]
    done = subprocess.run(line, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("different: layer 1 experts")
    assert done.stderr.splitlines()[-1].endswith(f"report: {where}/report.html")
    command = " ".join(["gptoss-convert", *words])
    assert command in (where / "report.html").read_text(encoding="utf-8")
    assert f"`{command}`" in (where / "report.md").read_text(encoding="utf-8")
    assert sorted(one.name for one in where.iterdir()) == ["report.html", "report.md"]


def test_without_its_libraries_the_report_is_refused_at_once(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['matplotlib'] = None\n"
        "from gptoss_convert.__main__ import main\n"
        f"sys.argv = ['x', 'verify', 'no', 'no', '--report', {str(tmp_path / 'r')!r}]\n"
        "main()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --report needs matplotlib: pip install 'gptoss-convert[report]'\n"
    )
    assert not (tmp_path / "r").exists()


def test_nothing_draws_unless_a_report_is_wanted(folder: Path) -> None:
    code = (
        "import sys\n"
        "from gptoss_convert.cli.main import cli\n"
        "cli.main(['verify', 'mxfp4', 'bf16', '--level', 'values', '--quiet'],"
        " standalone_mode=False)\n"
        "heavy = {'matplotlib', 'jinja2', 'torch'} & set(sys.modules)\n"
        "print(*heavy, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True
    )
    assert done.stderr.split() == []

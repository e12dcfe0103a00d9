"""Pages: what a command tells people, in plain text for pipes and styled for a terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from io import StringIO
from itertools import groupby
from typing import TYPE_CHECKING, TextIO

from gptoss_convert.machine.terminal import is_dumb, printable

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_WIDEST = 120
"""Columns of a terminal that a page fills at most."""
_STYLES = {
    **dict.fromkeys(("same", "intact", "done"), "green"),
    **dict.fromkeys(("different", "problem", "error"), "red"),
    "note": "yellow",
}
"""Of cells that are such a word, and of lines that begin with one and a colon."""


Row = tuple[str, ...]


@dataclass(frozen=True)
class Facts:
    """Keys and values."""

    rows: Mapping[str, str]


@dataclass(frozen=True)
class Grid:
    """Rows under column titles; only cells of the last column may have several lines."""

    columns: tuple[str, ...]
    rows: Sequence[Row]
    right: frozenset[str] = frozenset()
    """Columns of numbers, which end flush."""
    names: bool = False
    """The first column holds tensor names: a terminal shows what they begin with once."""
    spare: tuple[str, ...] = ()
    """Columns that a narrow terminal leaves out, the first ones first."""


Page = Sequence[str | Facts | Grid]
"""Lines, facts and tables, from top to bottom."""


def render(page: Page, stream: TextIO) -> str:
    """The page as fits the stream: styled for a terminal, plain for everything else."""
    return styled(page) if is_styled(stream) else plain(page)


def is_styled(stream: TextIO) -> bool:
    """Whether the stream shows colours: a terminal that is not dumb, or FORCE_COLOR is set."""
    return not is_dumb() and (bool(os.environ.get("FORCE_COLOR")) or stream.isatty())


def plain(page: Page) -> str:
    """Text without styles whose lines do not depend on any terminal."""
    return "\n".join(line for block in page for line in _plain(block))


def _plain(block: str | Facts | Grid) -> list[str]:
    if isinstance(block, str):
        return [printable(block)]
    if isinstance(block, Facts):
        return _aligned(list(block.rows.items()), (False, False))
    right = [name in block.right for name in block.columns]
    return _aligned([block.columns, *_single_lines(block.rows)], right)


def _single_lines(rows: Iterable[Row]) -> Iterator[Row]:
    """The rows, further lines of a last cell in rows of their own."""
    for *firsts, last in rows:
        line, *others = last.split("\n")
        yield (*firsts, line)
        yield from ((*("" for _ in firsts), other) for other in others)


def _aligned(rows: Sequence[Row], right: Sequence[bool]) -> list[str]:
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = [">" if flush else "<" for flush in right]
    return [
        "  ".join(f"{c:{s}{w}}" for c, s, w in zip(row, sides, widths, strict=True)).rstrip()
        for row in rows
    ]


def styled(page: Page) -> str:
    """Text with colours, as wide as the terminal; NO_COLOR leaves bold and dim."""
    import shutil

    from rich.console import Console

    width = min(shutil.get_terminal_size().columns, _WIDEST)
    # Text first, printed by click: whether a reader leaves early is decided in one place.
    text = StringIO()
    console = Console(file=text, force_terminal=True, width=width, highlight=False)
    for block in page:
        console.print(_rich(block, width))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def _rich(block: str | Facts | Grid, width: int) -> RenderableType:
    from rich.table import Table as RichTable

    if isinstance(block, str):
        return _rich_line(block)
    if isinstance(block, Grid) and block.names:
        block = _fitted(block, width)
    grid = RichTable(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    if isinstance(block, Facts):
        grid.show_header = False
        grid.add_column(style="dim", no_wrap=True)
        grid.add_column(overflow="fold")
        rows = block.rows.items()
    else:
        for name in block.columns:
            flush = name in block.right
            grid.add_column(
                name, justify="right" if flush else "left", no_wrap=flush, overflow="fold"
            )
        rows = _single_lines(block.rows)
    for row in rows:
        grid.add_row(*map(_rich_cell, row), style="bold" if row[0].endswith(".") else "")
    return grid


def _rich_line(line: str) -> Text:
    from rich.text import Text

    word, colon, rest = line.partition(":")
    if word not in _STYLES:
        return Text(printable(line))
    return Text.assemble((word + colon, f"bold {_STYLES[word]}"), printable(rest))


def _rich_cell(cell: str) -> Text:
    from rich.text import Text

    return Text(printable(cell), style=_STYLES.get(cell, ""))


_LAYERS = re.compile(r"(.*?\{[^}]*\}|\w+\.\w+(?=\.\w+\.))\.")
"""What a tensor's name begins with: up to its layers, or the first two of four words or more."""
_MODULE = re.compile(r"\w+\.(?=\w)")
"""The module that a tensor's name within a layer begins with."""


def _fitted(table: Grid, width: int) -> Grid:
    """A table of tensors as an outline: of two levels, then of fewer columns if it is too wide."""
    outlines = [
        replace(table, rows=_outline(table.rows, levels))
        for levels in ((_LAYERS,), (_LAYERS, _MODULE))
    ]
    for count in range(1, len(table.spare) + 1):
        outlines.append(_without(outlines[1], table.spare[:count]))
    return next((one for one in outlines if _width(one) <= width), outlines[-1])


def _outline(rows: Sequence[Row], beginnings: Sequence[re.Pattern[str]]) -> list[Row]:
    """The rows, names that begin alike indented below that beginning, level by level."""

    def beginning(row: Row) -> str:
        match = beginnings[0].match(row[0])
        return match[0] if match else ""

    if not beginnings:
        return list(rows)
    found: list[Row] = []
    for start, group in groupby(rows, beginning):
        members = list(group)
        if not start or len(members) == 1:
            found += members
            continue
        inside = [(name.removeprefix(start), *cells) for name, *cells in members]
        found.append((start, *("" for _ in members[0][1:])))
        found += [(f"  {name}", *cells) for name, *cells in _outline(inside, beginnings[1:])]
    return found


def _without(table: Grid, names: Sequence[str]) -> Grid:
    """The table without these columns."""
    kept = [place for place, name in enumerate(table.columns) if name not in names]
    rows = [tuple(row[place] for place in kept) for row in table.rows]
    return replace(table, columns=tuple(table.columns[place] for place in kept), rows=rows)


def _width(table: Grid) -> int:
    columns = zip(table.columns, *table.rows, strict=True)
    return sum(max(map(len, column)) + 2 for column in columns) - 2

"""What a page says, before it is HTML or Markdown: sections of text, tables and figures."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Drawn

Tone = Literal["same", "within", "different"]


SHOWN = 20
"""Rows of a table of the worst; the JSON has them all."""


NONE = "–"
"""Where there is nothing to say."""


class Code(str):
    """Text to be set as it stands in a file: a tensor's name, a path, a command."""

    __slots__ = ()


@dataclass(frozen=True)
class Column:
    """A table's column."""

    title: str
    number: bool = False
    """Whether its cells are numbers, set flush right."""


@dataclass(frozen=True)
class Table:
    """Rows of text."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Facts:
    """Names and values."""

    rows: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Listing:
    """Sentences, one an item."""

    items: tuple[str, ...]


@dataclass(frozen=True)
class Figure:
    """A drawing, what it shows, and the same numbers as a table."""

    name: str
    title: str
    """What is to be seen, in one sentence."""
    note: str
    """How to read it."""
    draw: Callable[[int], Drawn]
    """The drawing at a width in CSS pixels."""
    numbers: Table


Part = Table | Facts | Listing | Figure


@dataclass(frozen=True)
class Section:
    """A question and its answer."""

    title: str
    lead: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Stage:
    """One level of the verification, for the summary at the top."""

    name: str
    answer: Literal["same", "different", "not run"]
    text: str


@dataclass(frozen=True)
class ReportPage:
    """A whole report."""

    title: str
    tone: Tone
    verdict: str
    reasons: tuple[str, ...]
    sides: tuple[tuple[str, Facts], ...]
    steps: tuple[Stage, ...]
    sections: tuple[Section, ...]


def columns(*titles: str) -> tuple[Column, ...]:
    """Columns by title; one that begins with `#` holds numbers."""
    return tuple(Column(one.removeprefix("#"), one.startswith("#")) for one in titles)


def visible(text: str) -> str:
    """The text on one line, with what does not print spelled out: names come from files."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def number(value: float) -> str:
    """Three digits that count, thousands separated; NONE where there is nothing to measure."""
    if isinstance(value, float) and math.isnan(value):
        return NONE
    if isinstance(value, int) or (math.isfinite(value) and value == int(value)):
        return f"{int(value):,}"
    return "∞" if math.isinf(value) else f"{value:.3g}"


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def power(base: int, exponent: int) -> str:
    """`10⁻⁵`."""
    return f"{base}{str(exponent).translate(_SUPERSCRIPTS)}"


def share(part: float) -> str:
    """A percentage that says 100 % or 0 % only where it is exact."""
    if part in (0, 1):
        return f"{100 * part:.0f} %"
    text = f"{100 * part:.2f}"
    return {"100.00": "> 99.99", "0.00": "< 0.01"}.get(text, text) + " %"


def counted(count: int, what: str) -> str:
    """`1 difference`, `2 differences`."""
    return f"{count:,} {what}" + ("" if count == 1 else "s")

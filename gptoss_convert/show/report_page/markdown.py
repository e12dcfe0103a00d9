"""A page as Markdown: what a figure shows stands there as its table."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from gptoss_convert.show.report_page.document import (
    NONE,
    Code,
    Facts,
    Figure,
    Listing,
    Part,
    ReportPage,
    Table,
)

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")
_MARKS = {"same": "✓", "different": "✗", "not run": NONE}


def markdown(page: ReportPage) -> str:
    """The whole page."""
    return "\n".join(_lines(page)) + "\n"


def _lines(page: ReportPage) -> Iterator[str]:
    yield from (f"# {escaped(page.verdict)}", "")
    yield from (escaped(reason) for reason in page.reasons)
    for title, facts in page.sides:
        yield from ("", f"**{escaped(title)}**", "", *_part(facts))
    yield ""
    yield from (f"- {_MARKS[s.answer]} {s.name}: {s.answer}. {escaped(s.text)}" for s in page.steps)
    for section in page.sections:
        yield from ("", f"## {escaped(section.title)}", "", escaped(section.lead))
        for part in section.parts:
            yield from ("", *_part(part))


def _part(part: Part) -> Iterator[str]:
    if isinstance(part, Figure):
        yield from (f"**{escaped(part.title)}**", "", escaped(part.note), "")
        yield from _table([column.title for column in part.numbers.columns], part.numbers)
    elif isinstance(part, Table):
        yield from _table([column.title for column in part.columns], part)
    elif isinstance(part, Facts):
        yield from (f"- {escaped(name)}: {escaped(value)}" for name, value in part.rows)
    else:
        assert isinstance(part, Listing)
        yield from (f"- {escaped(item)}" for item in part.items)


def _table(titles: Sequence[str], table: Table) -> Iterator[str]:
    rules = ("---:" if column.number else "---" for column in table.columns)
    yield f"| {' | '.join(map(escaped, titles))} |"
    yield f"| {' | '.join(rules)} |"
    yield from (f"| {' | '.join(map(escaped, row))} |" for row in table.rows)


def escaped(text: str) -> str:
    """Text that Markdown shows as it is; code between more backticks than it holds in a row."""
    if isinstance(text, Code) and text:
        longest = max((len(run) for run in re.findall("`+", text)), default=0)
        fence, room = "`" * (longest + 1), " " if "`" in text else ""
        return f"{fence}{room}{text}{room}{fence}".replace("|", r"\|")
    return _SPECIAL.sub(r"\\\1", text)

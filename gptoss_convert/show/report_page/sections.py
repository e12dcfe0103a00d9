"""The sections of a verification's report: each a question, a sentence, figures and tables."""

from __future__ import annotations

from collections.abc import Iterator

from gptoss_convert.show.report_page.document import (
    NONE,
    SHOWN,
    Listing,
    Part,
    Section,
    Table,
    columns,
    number,
    visible,
)
from gptoss_convert.show.report_page.logit_sections import figure_sections, number_sections
from gptoss_convert.show.report_page.update_section import update_section
from gptoss_convert.show.report_page.value_sections import value_sections
from gptoss_convert.show.report_page.verdict import Levels


def sections(levels: Levels) -> Iterator[Section]:
    """All sections that have something to say, in the order a reader asks."""
    if "logits" in levels:
        yield from update_section(levels["logits"]["numbers"])
        yield from figure_sections(levels["logits"]["numbers"])
    if "values" in levels:
        yield from value_sections(levels["values"]["numbers"])
    yield from _findings(levels)
    if "logits" in levels:
        yield from number_sections(levels["logits"]["numbers"])
    yield from _oracle(levels)


def _findings(levels: Levels) -> Iterator[Section]:
    parts: list[Part] = []
    for name, level in levels.items():
        if not level["same"]:
            told = level["findings"][:SHOWN]
            more = len(level["findings"]) - len(told)
            rest = [f"… and {more} more"] if more else []
            parts.append(Listing(tuple(f"{name}: {visible(one)}" for one in [*told, *rest])))
    if parts:
        yield Section("What did each level find?", "In the words of the command.", tuple(parts))


def _oracle(levels: Levels) -> Iterator[Section]:
    if "oracle" not in levels:
        return
    rows: list[tuple[str, ...]] = []
    for side, found in levels["oracle"]["numbers"].items():
        if isinstance(found, str):
            rows.append((side, visible(found), NONE, NONE, NONE))
            continue
        judged = f"{found['settled']:,} of {found['positions']:,}"
        worst = (found["max_delta"], found["limit"], found["median_delta"])
        rows.append((side, judged, *map(number, worst)))
    titles = ("side", "positions judged", "#Δlogit, worst", "#limit", "#Δlogit, median")
    lead = (
        "Each directory loaded by its ecosystem's own code, against the shared forward pass. "
        "Positions after a router's near tie are not judged: rounding decides there."
    )
    yield Section(
        "Do the ecosystems' own models agree?", lead, (Table(columns(*titles), tuple(rows)),)
    )

"""A verification as a page: the verdict first, then what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptoss_convert.show.report_page.document import ReportPage, visible
from gptoss_convert.show.report_page.sections import sections
from gptoss_convert.show.report_page.served_page import served_page
from gptoss_convert.show.report_page.surroundings import side, surroundings
from gptoss_convert.show.report_page.verdict import headline, reasons, steps, tone


def page_of(summary: Mapping[str, Any], command: str | None) -> ReportPage:
    """The page of a verification's summary."""
    levels = {level["name"]: level for level in summary["levels"]}
    if "served" in levels:
        return served_page(summary, levels, command)
    ours, theirs = (visible(summary[name]["path"]) for name in ("source", "target"))
    return ReportPage(
        title=f"{ours} and {theirs}",
        tone=tone(summary, levels),
        verdict=headline(summary, levels),
        reasons=reasons(summary, levels),
        sides=(("SOURCE", side(summary["source"])), ("TARGET", side(summary["target"]))),
        steps=steps(levels),
        sections=(*sections(levels), *surroundings(levels, summary["limits"], command)),
    )

"""A page as one HTML file that asks for nothing else: styles and drawings stand in it."""

from __future__ import annotations

from importlib import resources

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from gptoss_convert.show.report_page import drawing
from gptoss_convert.show.report_page.document import Code, Facts, Figure, Listing, ReportPage, Table

_WIDTHS = {"wide": drawing.WIDE, "narrow": drawing.NARROW}
_KINDS = {Figure: "figure", Table: "table", Facts: "facts", Listing: "listing"}


def html(page: ReportPage) -> str:
    """The whole page; every text is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True,
                              lstrip_blocks=True)  # fmt: skip
    environment.tests["code"] = lambda text: isinstance(text, Code)
    environment.filters["kind"] = lambda part: _KINDS[type(part)]
    environment.filters["drawn"] = drawn
    template = environment.from_string(_file("report.html.jinja"))
    return template.render(page=page, style=Markup(_file("report.css")))


def drawn(figure: Figure) -> list[tuple[str, Markup]]:
    """The figure for a wide page and for a narrow one, as SVG."""
    with drawing.style():
        return [
            (name, Markup(drawing.svg(figure.draw(width), f"{figure.name}-{name}")))
            for name, width in _WIDTHS.items()
        ]


def _file(name: str) -> str:
    return (
        resources.files("gptoss_convert.show.report_page")
        .joinpath(name)
        .read_text(encoding="utf-8")
    )

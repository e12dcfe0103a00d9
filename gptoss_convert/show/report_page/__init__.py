"""Reports for people: a verification as one HTML page and as Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptoss_convert.errors import UsageError
from gptoss_convert.show.texts import write_text


def prepare(folder: Path) -> None:
    """Make the folder of a report; raises UsageError if what draws it is not installed."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"--report needs {error.name}: pip install 'gptoss-convert[report]'"
        ) from None
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--report {folder}: not a directory")
    folder.mkdir(parents=True, exist_ok=True)


def write(summary: Mapping[str, Any], folder: Path, command: str | None = None) -> Path:
    """Write report.html and report.md for the summary of a verification; returns the former.

    The verification must have collected its statistics.
    """
    prepare(folder)
    from gptoss_convert.show.report_page.content import page_of
    from gptoss_convert.show.report_page.html import html
    from gptoss_convert.show.report_page.markdown import markdown

    page = page_of(summary, command)
    path = folder / "report.html"
    write_text(path, html(page))
    write_text(path.with_suffix(".md"), markdown(page))
    return path

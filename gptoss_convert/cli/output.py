"""How a command shows its result, and complains."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import click

from gptoss_convert.errors.refusals import disk_error
from gptoss_convert.errors.secrets import scrub
from gptoss_convert.machine.standard_streams import discard_output
from gptoss_convert.machine.terminal import printable
from gptoss_convert.show.documents import document
from gptoss_convert.show.pages import Page, is_styled, render

_LONGEST = 10_000
"""Characters of a line on stderr: values from untrusted files may be of any length."""


def show(
    kind: str, content: Mapping[str, Any], page: Page, *, as_json: bool, quiet: bool = False
) -> None:
    """Print a result as a JSON document or as a page for people, who may want it quiet."""
    if as_json:
        say(document(kind, content))
    elif not quiet:
        say(render(page, sys.stdout))


def say(text: str) -> None:
    """Print to stdout; that whoever read it has left is no error."""
    try:
        click.echo(scrub(text), color=True)
    except BrokenPipeError:
        # Nothing more can be said on it, not even at exit.
        discard_output()
    except OSError as error:
        raise disk_error("stdout", error) from None


def complain(text: str) -> None:
    """Print a line to stderr; a terminal shows the word before its colon in red."""
    text = scrub(text)
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    word, colon, rest = printable(shown).partition(":")
    if is_styled(sys.stderr) and not os.environ.get("NO_COLOR"):
        word = click.style(word, fg="red", bold=True)
    with suppress(BrokenPipeError):
        click.echo(word + colon + rest, err=True, color=True)

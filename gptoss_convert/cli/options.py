"""What several commands share: value types, options, the way a result is shown."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import click

from gptoss_convert.errors import EXIT_CODES
from gptoss_convert.formats import registry
from gptoss_convert.machine.terminal import printable
from gptoss_convert.show.documents import document
from gptoss_convert.show.pages import Page, is_styled, render

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
FORMATS = [*registry.FORMATS]
_LONGEST = 10_000
"""Characters of a line on stderr: values from untrusted files may be of any length."""
EPILOG = "\b\nExit status:\n" + "\n".join(f"  {code:<4}{why}" for code, why in EXIT_CODES.items())


class Size(click.ParamType[int]):
    """A number of bytes such as 5GB, 256MB or 4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; fails with the accepted form."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", value.strip().lower())
        if match is None:
            self.fail(f"{value!r} is no size; write for example 5GB, 256MB or 4GiB", param, ctx)
        unit = match[2] or ""
        return int(float(match[1]) * (_UNITS.get(unit) or _BINARY[unit]))


class Share(click.ParamType[float]):
    """A share such as 5%."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """From 0 to 1; fails with the accepted form."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%", value.strip())
        if match is None or not 0 < float(match[1]) <= 100:
            self.fail(f"{value!r} is no share; write for example 5%", param, ctx)
        return float(match[1]) / 100


class Choice(click.Choice[str]):
    """One of a few words."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Lists the words, and names the one that was probably meant."""
        message = super().get_invalid_choice_message(value, ctx)
        near = get_close_matches(str(value), self.choices, n=1)
        return f"{message} Did you mean {near[0]!r}?" if near else message


PATH = click.Path(path_type=Path)
SOURCE = click.Path()
"""A directory or a repository on the Hub, as it was written; shells complete it as a path."""
revision_option = click.option(
    "--revision", help="SOURCE on the Hub: a branch, tag or commit.  [default: its main branch]"
)
as_json_flag = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_flag = click.option(
    "-q", "--quiet", is_flag=True, help="Print nothing but errors, and --json if asked for."
)
overwrite_flag = click.option(
    "--overwrite", is_flag=True, help="Replace TARGET, once everything is written."
)
iteration_option = click.option(
    "--iteration", type=click.IntRange(0), help="Megatron SOURCE: not the latest iteration."
)
config_option = click.option(
    "--config",
    type=PATH,
    help="Megatron SOURCE: a Hugging Face config.json, where it carries none.",
)
vocab_size_option = click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Megatron SOURCE: rows of the vocabulary without padding, where nothing says so.",
)
strict_flag = click.option(
    "--strict", is_flag=True, help="Refuse what is only remarked on: files that nothing names."
)
workers_option = click.option(
    "--workers",
    type=click.IntRange(1, 256),
    help="Steps in flight at once.  [default: processors + 2, at most 16]",
)
rank_log_option = click.option(
    "--rank-log", type=PATH, help="Under torchrun: directory for a log of each rank."
)


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
        click.echo(text, color=True)
    except BrokenPipeError:
        # Nothing more can be said on it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Print a line to stderr; a terminal shows the word before its colon in red."""
    shown = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
    word, colon, rest = printable(shown).partition(":")
    if is_styled(sys.stderr) and not os.environ.get("NO_COLOR"):
        word = click.style(word, fg="red", bold=True)
    with suppress(BrokenPipeError):
        click.echo(word + colon + rest, err=True, color=True)

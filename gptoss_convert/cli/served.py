"""The two forms of `verify`, with TARGET and with --served: which options go with each."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from gptoss_convert.cli.options import options_of, side_of
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.choices import Choices
from gptoss_convert.verify.result import ServedOptions, VerifyOptions

served_option = click.option(
    "--served", metavar="URL", help="Compare SOURCE with what a running server answers."
)
served_options = options_of(ServedOptions)


def require_one_form(context: click.Context) -> None:
    """Raise UsageError unless there is TARGET or a server, and no option of the other."""
    served, target = context.params["served"], context.params["target"]
    if served is None and target is None:
        raise click.UsageError("Missing argument 'TARGET', or --served URL.", context)
    if served is not None and target is not None:
        raise click.UsageError("Give TARGET or --served URL, not both.", context)
    ours, theirs = ({one.name for one in fields(kind)} for kind in (ServedOptions, VerifyOptions))
    foreign = ours - theirs if served is None else {*(theirs - ours), "rank_log"}
    for parameter in context.command.params:
        name = str(parameter.name)
        wrong = name in foreign or (served is not None and name.endswith("_target"))
        if wrong and context.get_parameter_source(name) == ParameterSource.COMMANDLINE:
            how = "needs --served URL" if served is None else "does not go with --served"
            raise click.UsageError(f"{parameter.opts[0]} {how}.", context)


def require_one_process(ranks: int) -> None:
    """Raise UsageError where several ask a server."""
    if ranks > 1:
        raise UsageError("--served: one process asks a server; start it without torchrun")


def fields_of(kind: type, options: dict[str, Any], *sides: str) -> dict[str, Any]:
    """The fields of VerifyOptions or ServedOptions that these options of the command give."""
    chosen = {side: side_of(Choices, side, options) for side in sides}
    return chosen | {one.name: options[one.name] for one in fields(kind) if one.name in options}

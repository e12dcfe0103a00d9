"""The form `verify SOURCE --served URL`: which options go with it, and which with TARGET."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from gptoss_convert.cli.options import options_of, side_of
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.machine.progress import Progress
from gptoss_convert.verify.result import ServedOptions, Verification, VerifyOptions

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


def verify_server(
    source: str, url: str, options: dict[str, Any], progress: Progress, ranks: int
) -> Verification:
    """Run the verification that these options of the command ask for."""
    from gptoss_convert.verify.served import verify_served

    if ranks > 1:
        raise UsageError("--served: one process asks a server; start it without torchrun")
    names = {one.name for one in fields(ServedOptions)} & options.keys()
    chosen: Mapping[str, Any] = {name: options[name] for name in names}
    choices = ServedOptions(source=side_of(Choices, "source", options), **chosen)
    return verify_served(source, url, choices, progress)

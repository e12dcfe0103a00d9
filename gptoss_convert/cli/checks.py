"""The commands that answer a question about checkpoints: check, verify, diff."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from gptoss_convert.check.options import Reading
from gptoss_convert.cli.options import (
    EPILOG,
    PATH,
    SOURCE,
    Percentage,
    as_json_flag,
    options_of,
    quiet_flag,
    rank_log_option,
    side_of,
    side_options,
)
from gptoss_convert.cli.output import complain, show
from gptoss_convert.cli.served import (
    fields_of,
    require_one_form,
    require_one_process,
    served_option,
    served_options,
)
from gptoss_convert.compare.options import DiffOptions
from gptoss_convert.errors import IntegrityError
from gptoss_convert.formats.choices import Choices
from gptoss_convert.machine import progress
from gptoss_convert.show import report
from gptoss_convert.show.diff_page import diff_page
from gptoss_convert.show.documents import document
from gptoss_convert.show.texts import require_place, write_text
from gptoss_convert.verify.result import ServedOptions, VerifyOptions


@click.command(epilog=EPILOG)
@click.argument("path", type=PATH)
@click.option("--read-data", is_flag=True, help="Read every byte, not headers only.")
@click.option("--read-data-subset", type=Percentage(), help="Read so much of the weights, as 5%.")
@options_of(Reading)
@options_of(Choices, place="PATH")
@as_json_flag
@quiet_flag
@click.pass_context
def check(
    context: click.Context,
    path: Path,
    *,
    read_data: bool,
    read_data_subset: float | None,
    seed: int | None,
    workers: int | None,
    max_memory: int | None,
    as_json: bool,
    quiet: bool,
    **choices: Any,
) -> None:
    """Check the checkpoint in PATH, with its manifest if it has one; name what is damaged.

    \b
    Examples:
      gptoss-convert check gpt-oss-20b
      gptoss-convert check gpt-oss-20b --read-data
    """
    from gptoss_convert.check.check import check

    share = 1.0 if read_data else read_data_subset or 0.0
    reading = Reading(share, seed, workers, max_memory)
    found = check(path, reading, Choices(**choices), progress.for_terminal(quiet))
    summary = found.summary()
    show("check", summary, report.check(summary), as_json=as_json, quiet=quiet)
    if found.problems:
        complain(f"error: {found.verdict}")
        context.exit(IntegrityError.exit_code)


@click.command(epilog=EPILOG)
@click.argument("source", type=SOURCE)
@click.argument("target", type=SOURCE, required=False)
@served_option
@served_options
@options_of(VerifyOptions)
@side_options(Choices, "source", "target")
@click.option(
    "--json",
    "json_to",
    is_flag=False,
    flag_value="-",
    metavar="[FILE]",
    help="Write the result to FILE as JSON; without FILE or with -, print it.",
)
@click.option("--report", "folder", type=PATH, help="Write report.html and report.md there.")
@click.option("--junit", type=PATH, help="Write the levels there as JUnit test cases.")
@rank_log_option
@quiet_flag
@click.pass_context
def verify(
    context: click.Context,
    source: str,
    target: str | None,
    *,
    served: str | None,
    json_to: str | None,
    folder: Path | None,
    junit: Path | None,
    rank_log: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Tell whether SOURCE and TARGET, checkpoints in any formats, are the same model.

    Or, with --served, whether the server at URL answers as the model in SOURCE does.

    \b
    Examples:
      gptoss-convert verify gpt-oss-20b gpt-oss-20b-bf16
      gptoss-convert verify gpt-oss-20b megatron --level values
      gptoss-convert verify gpt-oss-20b --served http://localhost:8000
    """
    from gptoss_convert.machine.ranks import join
    from gptoss_convert.verify.gate import verify_checkpoints
    from gptoss_convert.verify.served import verify_served

    require_one_form(context)
    with join() as ranks:
        if rank_log:
            ranks.keep_log(rank_log)
        if ranks.rank == 0:
            # Before hours of comparing: is all there that the reports need?
            _prepare(json_to, folder, junit)
        told = progress.for_rank(quiet, ranks.rank, ranks.log)
        if served is not None:
            require_one_process(ranks.size)
            chosen = fields_of(ServedOptions, options, "source")
            done = verify_served(source, served, ServedOptions(**chosen), told)
        else:
            chosen = fields_of(VerifyOptions, options, "source", "target")
            chosen["statistics"] = folder is not None
            done = verify_checkpoints(source, str(target), VerifyOptions(**chosen), told, ranks)
        if ranks.rank == 0:
            _write(done.summary(), json_to, folder, junit)
    if ranks.rank == 0:
        summary = done.summary()
        as_json = json_to == "-"
        show("verify", summary, report.verification(summary), as_json=as_json, quiet=quiet)
        if quiet and not done.same:
            complain(done.verdict)
        if folder and not quiet:
            click.echo(f"report: {folder / 'report.html'}", err=True)
    context.exit(0 if done.same else 1)


def _prepare(json_to: str | None, folder: Path | None, junit: Path | None) -> None:
    """Find out whether the files that were asked for can be written."""
    from gptoss_convert.show import report_page

    if folder:
        report_page.prepare(folder)
    if junit:
        require_place("--junit", junit)
    if json_to not in (None, "-"):
        require_place("--json", Path(json_to))


def _write(
    summary: dict[str, Any],
    json_to: str | None,
    folder: Path | None,
    junit: Path | None,
) -> None:
    """Write a verification to the files that were asked for."""
    from gptoss_convert.show import report_page

    if junit:
        write_text(junit, report.junit(summary))
    if json_to not in (None, "-"):
        write_text(Path(json_to), document("verify", summary) + "\n")
    if folder:
        report_page.write(summary, folder, shlex.join(["gptoss-convert", *sys.argv[1:]]))


@click.command(epilog=EPILOG)
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@options_of(DiffOptions)
@side_options(Choices, "a", "b")
@as_json_flag
@quiet_flag
@click.pass_context
def diff(
    context: click.Context,
    a: str,
    b: str,
    *,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Tell what differs between A and B, checkpoints in any formats: configuration and weights.

    \b
    Examples:
      gptoss-convert diff gpt-oss-20b fine-tuned
      gptoss-convert diff gpt-oss-20b fine-tuned --json
    """
    from gptoss_convert.compare.diff import diff
    from gptoss_convert.hub.sources import locate, opening, with_weights

    of_a, of_b = (side_of(Choices, side, options) for side in "ab")
    told = progress.for_terminal(quiet)
    with opening(locate(a), of_a) as ours, opening(locate(b), of_b) as theirs:
        ours, theirs = with_weights(ours, of_a, told), with_weights(theirs, of_b, told)
        found = diff(ours, theirs, progress=told, **options)
    summary = found.summary()
    show("diff", summary, diff_page(summary), as_json=as_json, quiet=quiet)
    context.exit(0 if found.same else 1)

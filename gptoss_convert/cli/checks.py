"""The commands that answer a question about checkpoints: check, verify, diff."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from gptoss_convert.cli.options import (
    EPILOG,
    FORMATS,
    PATH,
    SOURCE,
    Choice,
    Share,
    Size,
    as_json_flag,
    complain,
    config_option,
    iteration_option,
    quiet_flag,
    rank_log_option,
    revision_option,
    show,
    strict_flag,
    vocab_size_option,
    workers_option,
)
from gptoss_convert.errors import IntegrityError
from gptoss_convert.machine import progress
from gptoss_convert.show import report
from gptoss_convert.show.documents import document


@click.command(epilog=EPILOG)
@click.argument("path", type=PATH)
@click.option("--read-data", is_flag=True, help="Read every byte, not headers only.")
@click.option("--read-data-subset", type=Share(), help="Read so much of the weights, as 5%.")
@click.option("--seed", type=int, help="Chooses the subset.  [default: another every time]")
@click.option(
    "--from",
    "source_format",
    type=Choice(FORMATS),
    help="Format to read, where PATH holds several.",
)
@iteration_option
@config_option
@vocab_size_option
@strict_flag
@workers_option
@click.option("--max-memory", type=Size(), default="4GB", help="Limit that buffers must fit in.")
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
    source_format: str | None,
    iteration: int | None,
    config: Path | None,
    vocab_size: int | None,
    strict: bool,
    workers: int | None,
    max_memory: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Check the checkpoint in PATH, with its manifest if it has one; name what is damaged.

    \b
    Examples:
      gptoss-convert check gpt-oss-20b
      gptoss-convert check gpt-oss-20b --read-data
    """
    from gptoss_convert.check.check import Reading, check
    from gptoss_convert.formats.checkpoint import Choices

    share = 1.0 if read_data else read_data_subset or 0.0
    choices = Choices(source_format, False, iteration, config, vocab_size, strict)
    reading = Reading(share, seed, workers, max_memory)
    found = check(path, reading, choices, progress.for_terminal(quiet))
    summary = found.summary()
    show("check", summary, report.check(summary), as_json=as_json, quiet=quiet)
    if found.problems:
        complain(f"error: {found.verdict}")
        context.exit(IntegrityError.exit_code)


@click.command(epilog=EPILOG)
@click.argument("source", type=SOURCE)
@click.argument("target", type=SOURCE)
@click.option(
    "--level",
    type=Choice(["header", "values", "logits", "oracle"]),
    default="logits",
    help="How deep to look; each level includes those before it.",
)
@click.option(
    "--from-source",
    "source_format",
    type=Choice(FORMATS),
    help="Format to read, where SOURCE holds several.",
)
@click.option(
    "--from-target",
    "target_format",
    type=Choice(FORMATS),
    help="Format to read, where TARGET holds several.",
)
@revision_option
@click.option(
    "--device",
    type=Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to compute logits; auto takes a GPU if there is one.",
)
@click.option(
    "--dtype",
    type=Choice(["float32", "bf16"]),
    default="float32",
    help="What to compute logits in; bf16 is faster and coarser.",
)
@click.option(
    "--tokens",
    type=PATH,
    help="JSON lines (.jsonl) of token ids or texts, or a text, instead of the fixed token set.",
)
@click.option("--prompt", help="Show the most likely next tokens of both sides after this text.")
@click.option(
    "--max-length",
    type=click.IntRange(1),
    help="Longest prompt.  [default: 32768 on a GPU, 4096 on a CPU]",
)
@click.option("--sample", type=click.IntRange(1), help="About how many positions to score.")
@click.option("--layers", type=click.IntRange(1), help="Compare only so many layers.")
@click.option(
    "--limits",
    type=Choice(["lossless", "float32", "bfloat16"]),
    default="lossless",
    help="What still counts as the same; beyond lossless the logits decide, not the values.",
)
@workers_option
@click.option("--max-memory", type=Size(), default="4GB", help="Limit that buffers must fit in.")
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
    target: str,
    *,
    json_to: str | None,
    folder: Path | None,
    junit: Path | None,
    rank_log: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Tell whether SOURCE and TARGET, checkpoints in any formats, are the same model.

    \b
    Examples:
      gptoss-convert verify gpt-oss-20b gpt-oss-20b-bf16
      gptoss-convert verify gpt-oss-20b megatron --level values
    """
    from gptoss_convert.machine.ranks import join
    from gptoss_convert.show import report_page
    from gptoss_convert.verify.gate import verify_checkpoints
    from gptoss_convert.verify.result import VerifyOptions

    with join() as ranks:
        if rank_log:
            ranks.keep_log(rank_log)
        if folder and ranks.rank == 0:
            # Before hours of comparing: is all there that the report needs?
            report_page.prepare(folder)
        told = progress.for_rank(quiet, ranks.rank, ranks.log)
        choices = VerifyOptions(**options, statistics=folder is not None)
        done = verify_checkpoints(source, target, choices, told, ranks)
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


def _write(
    summary: dict[str, Any],
    json_to: str | None,
    folder: Path | None,
    junit: Path | None,
) -> None:
    """Write a verification to the files that were asked for."""
    from gptoss_convert.show import report_page

    if junit:
        junit.write_text(report.junit(summary), encoding="utf-8")
    if json_to not in (None, "-"):
        Path(json_to).write_text(document("verify", summary) + "\n", encoding="utf-8")
    if folder:
        report_page.write(summary, folder, shlex.join(["gptoss-convert", *sys.argv[1:]]))


@click.command(epilog=EPILOG)
@click.argument("a", type=SOURCE)
@click.argument("b", type=SOURCE)
@click.option(
    "--from-a",
    "format_a",
    type=Choice(FORMATS),
    help="Format to read, where A holds several.",
)
@click.option(
    "--from-b",
    "format_b",
    type=Choice(FORMATS),
    help="Format to read, where B holds several.",
)
@workers_option
@click.option("--max-memory", type=Size(), default="4GB", help="Limit that buffers must fit in.")
@as_json_flag
@quiet_flag
@click.pass_context
def diff(
    context: click.Context,
    a: str,
    b: str,
    *,
    format_a: str | None,
    format_b: str | None,
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
    from gptoss_convert.formats.checkpoint import Choices

    choices = (Choices(format_a), Choices(format_b))
    found = diff(a, b, choices, progress=progress.for_terminal(quiet), **options)
    summary = found.summary()
    show("diff", summary, report.diff(summary), as_json=as_json, quiet=quiet)
    context.exit(0 if found.same else 1)

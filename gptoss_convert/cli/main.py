"""The command line: each command reads options, makes one call, and prints text or JSON."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gptoss_convert.cli import ending
from gptoss_convert.cli.checks import check, diff, verify
from gptoss_convert.cli.options import (
    EPILOG,
    PATH,
    SOURCE,
    Choice,
    as_json_flag,
    options_of,
    quiet_flag,
    rank_log_option,
)
from gptoss_convert.cli.output import say, show
from gptoss_convert.conversion.options import Options
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.choices import Choices
from gptoss_convert.machine import progress
from gptoss_convert.show import report
from gptoss_convert.show.pages import Page, render
from gptoss_convert.synth.options import SynthOptions
from gptoss_convert.version import VERSION

if TYPE_CHECKING:
    from gptoss_convert.conversion.plan import Conversion
    from gptoss_convert.formats.checkpoint import Checkpoint
    from gptoss_convert.formats.repository import Repository
    from gptoss_convert.machine.ranks import Ranks

PROGRAM = "gptoss-convert"
COMPLETE = "_GPTOSS_CONVERT_COMPLETE"
"""The variable with which a shell's script asks for completions; its name follows the program's."""
_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}


@click.group(context_settings=_SETTINGS, epilog=EPILOG)
@click.version_option(VERSION, "-V", "--version", prog_name=PROGRAM)
def cli() -> None:
    """Convert GPT-OSS checkpoints: Hugging Face (MXFP4, BF16), OpenAI's layout, Megatron-Core.

    Values are exact, memory is bounded, and TARGET appears complete or not at all.
    """


@cli.command(epilog=EPILOG)
@click.argument("source", type=SOURCE)
@click.argument("target", type=PATH)
@options_of(Options)
@click.option("--push-to", help="Upload TARGET to this repository on the Hub when it is complete.")
@click.option("--public", is_flag=True, help="A repository that --push-to makes is public.")
@click.option("--dry-run", is_flag=True, help="Show the plan, write nothing.")
@rank_log_option
@as_json_flag
@quiet_flag
@click.option("-v", "--verbose", is_flag=True, help="Show the plan before it runs.")
def convert(
    source: str,
    target: Path,
    *,
    push_to: str | None,
    public: bool,
    dry_run: bool,
    rank_log: Path | None,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a checkpoint directory or a repository on the Hub, to a new directory TARGET.

    \b
    Examples:
      gptoss-convert convert openai/gpt-oss-20b out --to hf --dtype bf16
      gptoss-convert convert gpt-oss-20b out --to hf --dtype bf16
      gptoss-convert convert out back --to hf --dtype mxfp4
      gptoss-convert convert gpt-oss-20b/original out --to hf --tokenizer gpt-oss-20b
      gptoss-convert convert gpt-oss-20b out --to megatron
    """
    from gptoss_convert.conversion.plan import plan
    from gptoss_convert.machine.ranks import join

    repository = _destination(push_to, dry_run)
    with join() as ranks:
        if rank_log:
            ranks.keep_log(rank_log)
        conversion = plan(source, target, Options(**options), ranks.local_size)
        if repository:
            _require_shareable(conversion)
        shown = _planned(conversion) if dry_run else _converted(conversion, ranks, quiet, verbose)
    if ranks.rank == 0:
        show(*shown, as_json=as_json, quiet=quiet)
        if repository:
            _push(conversion, repository, public, quiet)


def _destination(push_to: str | None, dry_run: bool) -> Repository | None:
    """Where --push-to will upload, checked before anything is read."""
    if push_to is None or dry_run:
        return None
    from gptoss_convert.hub.push import destination

    return destination(push_to)


def _require_shareable(conversion: Conversion) -> None:
    """Nothing that --push-to will publish tells what it should not."""
    from gptoss_convert.conversion.shareable import require_shareable

    require_shareable(conversion)


def _push(conversion: Conversion, repository: Repository, public: bool, quiet: bool) -> None:
    from gptoss_convert.hub.push import instead, push

    ending.is_there(instead(conversion.target, repository))
    place = push(conversion.target, conversion.names, repository, public)
    click.echo("" if quiet else f"pushed: {place}", err=True, nl=not quiet)


def _planned(conversion: Conversion) -> tuple[str, Mapping[str, Any], Page]:
    """What a conversion would do, as a document of this kind and as a page."""
    from gptoss_convert.conversion.estimate import estimate_seconds
    from gptoss_convert.conversion.publish import require_unmounted

    require_unmounted(conversion.target)
    summary = conversion.summary() | {"estimated_seconds": estimate_seconds(conversion)}
    return "plan", summary, report.conversion(summary)


def _converted(
    conversion: Conversion, ranks: Ranks, quiet: bool, verbose: bool
) -> tuple[str, Mapping[str, Any], Page]:
    """What a conversion did, as a document of this kind and as a page."""
    from gptoss_convert.conversion.run import run
    from gptoss_convert.formats.registry import FORMATS

    if verbose and ranks.rank == 0:
        page = report.conversion(conversion.summary())
        click.echo(render(page, sys.stderr), err=True, color=True)
    told = progress.for_rank(quiet, ranks.rank, ranks.log)
    done = run(conversion, told, ranks=ranks).summary()
    words = FORMATS[conversion.options.to].launch_words
    launch = words(conversion.source.config, done["target"]["path"]) if words else ()
    return "convert", done, report.finished(done, launch)


@cli.command(epilog=EPILOG)
@click.argument("source", type=SOURCE)
@options_of(Options, "revision")
@options_of(Choices)
@click.option("--launch", is_flag=True, help="Print how to load it in Megatron, as Markdown.")
@click.option("--base", type=SOURCE, help="Of an adapter: the model that it belongs to.")
@as_json_flag
def inspect(
    source: str,
    *,
    revision: str | None,
    launch: bool,
    base: str | None,
    as_json: bool,
    **choices: Any,
) -> None:
    """Tell what the checkpoint or adapter SOURCE is: format, size, anything odd. Headers only.

    SOURCE is a directory, or a repository on the Hub, of which a few MB are read.

    \b
    Examples:
      gptoss-convert inspect gpt-oss-20b
      gptoss-convert inspect openai/gpt-oss-120b
      gptoss-convert inspect lora --base gpt-oss-20b
    """
    from gptoss_convert.check.inspection import inspect
    from gptoss_convert.hub.adapters import adapter_at

    if adapter := adapter_at(source, revision, choices["follow_links"]):
        if launch:
            raise UsageError(f"{source}: an adapter; --launch is for models: convert one with it")
        _show_adapter(adapter, base, as_json)
        return
    found = inspect(source, Choices(**choices), revision)
    if launch:
        say(_launch_page(found.checkpoint))
        return
    summary = found.summary()
    show("inspect", summary, report.inspection(summary), as_json=as_json)


def _launch_page(checkpoint: Checkpoint) -> str:
    """How to load it; raises UsageError where its format says all by itself."""
    if checkpoint.kind.launch_page is None:
        raise UsageError(
            f"{checkpoint.root}: {checkpoint.label}; --launch is for Megatron: convert it first"
        )
    return checkpoint.kind.launch_page(checkpoint.config)


def _show_adapter(root: Path, base: str | None, as_json: bool) -> None:
    """Tell what an adapter is, for its base or for whichever released model fits."""
    from gptoss_convert.check.adapter_inspection import inspect_adapter
    from gptoss_convert.hub.sources import locate, opening

    with opening(locate(base), Choices()) if base else nullcontext() as opened:
        summary = inspect_adapter(root, opened).summary()
    show("adapter", summary, report.adapter(summary), as_json=as_json)


@cli.command(epilog=EPILOG)
@click.argument("target", type=PATH)
@options_of(SynthOptions)
@as_json_flag
@quiet_flag
def synth(target: Path, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write a synthetic checkpoint: published names, shapes and files, realistic random values.

    \b
    Examples:
      gptoss-convert synth tiny
      gptoss-convert synth gpt-oss-20b --model 20b
    """
    from gptoss_convert.synth.synth import synth

    done = synth(target, progress.for_terminal(quiet), **options).summary()
    show("convert", done, report.finished(done), as_json=as_json, quiet=quiet)


@cli.command(epilog=EPILOG)
@click.argument("shell", type=Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script with which SHELL completes commands, options, choices and paths.

    \b
    Examples:
      gptoss-convert completion bash > ~/.local/share/bash-completion/completions/gptoss-convert
      gptoss-convert completion zsh > "${fpath[1]}/_gptoss-convert"
      gptoss-convert completion fish > ~/.config/fish/completions/gptoss-convert.fish
    """
    from click.shell_completion import get_completion_class

    kind = get_completion_class(shell)
    assert kind is not None
    say(kind(cli, {}, PROGRAM, COMPLETE).source())


cli.add_command(check)
cli.add_command(diff)
cli.add_command(verify)

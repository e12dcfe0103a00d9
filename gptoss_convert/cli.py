"""The command line: options in, one call, text or JSON out."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import click

from gptoss_convert import progress, report
from gptoss_convert.errors import EXIT_CODES
from gptoss_convert.version import VERSION

_SETTINGS = {"help_option_names": ["-h", "--help"], "show_default": True, "max_content_width": 100}
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
_FORMATS = ["hf", "openai", "megatron"]
_EPILOG = "\b\nExit status:\n" + "\n".join(f"  {code:<4}{why}" for code, why in EXIT_CODES.items())


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


_PATH = click.Path(path_type=Path)
_json = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
_quiet = click.option("--quiet", is_flag=True, help="No progress; notes and errors only.")
_overwrite = click.option(
    "--overwrite", is_flag=True, help="Replace TARGET, once everything is written."
)
_iteration = click.option(
    "--iteration", type=click.IntRange(0), help="Megatron SOURCE: not the latest iteration."
)
_config = click.option(
    "--config",
    type=_PATH,
    help="Megatron SOURCE: a Hugging Face config.json, where it carries none.",
)
_vocab_size = click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Megatron SOURCE: rows of the vocabulary without padding, where nothing says so.",
)
_strict = click.option(
    "--strict", is_flag=True, help="Refuse what is only remarked on: files that nothing names."
)
_workers = click.option(
    "--workers",
    type=click.IntRange(1, 256),
    help="Steps in flight at once.  [default: processors + 1, at most 16]",
)


@click.group(context_settings=_SETTINGS, epilog=_EPILOG)
@click.version_option(VERSION, "-V", "--version", prog_name="gptoss-convert")
def cli() -> None:
    """Convert GPT-OSS checkpoints: Hugging Face (MXFP4, BF16), OpenAI's layout, Megatron-Core.

    Values are exact, memory is bounded, and TARGET appears complete or not at all.
    """


@cli.command(epilog=_EPILOG)
@click.argument("source", type=_PATH)
@click.argument("target", type=_PATH)
@click.option("--to", required=True, type=click.Choice(_FORMATS), help="Format of TARGET.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "mxfp4", "bf16"]),
    default="keep",
    help="Encoding of the expert weights in TARGET.",
)
@click.option(
    "--from",
    "source_format",
    type=click.Choice(_FORMATS),
    help="Format to read, where SOURCE holds several.",
)
@click.option(
    "--shards",
    type=click.Choice(["auto", "size", "published"]),
    default="auto",
    help="Files of TARGET: as the MXFP4 original's where a sidecar remembers them, else by size; "
    "always by size; or OpenAI's own names, order and boundaries.",
)
@click.option("--max-shard-size", type=Size(), default="5GB", help="Largest file, by size.")
@click.option("--max-memory", type=Size(), default="4GB", help="Limit that buffers must fit in.")
@_workers
@click.option(
    "--scales",
    type=_PATH,
    help="An MXFP4 checkpoint, or a BF16 one with a sidecar, whose block scales to prefer. "
    "Restores its bytes, never changes a value.  [default: SOURCE's sidecar]",
)
@click.option("--no-scales", is_flag=True, help="Write no sidecar of MXFP4 scales beside BF16.")
@click.option("--cast", is_flag=True, help="Round a float32 or float16 SOURCE to BF16.")
@click.option("--lossy", is_flag=True, help="Round values that have no exact MXFP4 form.")
@click.option("--repair", is_flag=True, help="Read what transformers 5.21 to 5.23 mis-saved.")
@click.option("--allow-nonfinite", is_flag=True, help="Keep infinities and NaN.")
@click.option("--allow-zero", is_flag=True, help="Keep weight matrices that are zero throughout.")
@_strict
@click.option(
    "--layout",
    type=click.Choice(["stacked", "per-layer"]),
    default="stacked",
    help="Megatron TARGET: all layers in one tensor, or a tensor a layer (120b loads faster).",
)
@click.option(
    "--also-local-spec",
    is_flag=True,
    help="Megatron TARGET: name the second norm as models without Transformer Engine do, too.",
)
@click.option(
    "--bridge",
    type=click.Choice(["modern", "legacy"]),
    default="modern",
    help="Megatron TARGET: run_config.yaml for Megatron-Bridge from 0.4.0 on, or before.",
)
@_iteration
@_config
@_vocab_size
@click.option("--tokenizer", type=_PATH, help="Directory whose tokenizer and template TARGET gets.")
@click.option("--restart", is_flag=True, help="Discard what an interrupted run left.")
@click.option(
    "--trust-journal",
    is_flag=True,
    help="Go on without reading back what an interrupted run wrote.",
)
@_overwrite
@click.option("--dry-run", is_flag=True, help="Show the plan, write nothing.")
@_json
@_quiet
@click.option("-v", "--verbose", is_flag=True, help="Show the plan before it runs.")
def convert(
    source: Path,
    target: Path,
    *,
    no_scales: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Convert SOURCE, a checkpoint directory, to a new directory TARGET.

    \b
    gptoss-convert convert gpt-oss-20b out --to hf --dtype bf16
    gptoss-convert convert out back --to hf --dtype mxfp4
    gptoss-convert convert gpt-oss-20b/original out --to hf --tokenizer gpt-oss-20b
    gptoss-convert convert gpt-oss-20b out --to megatron
    """
    from gptoss_convert.conversion import plan
    from gptoss_convert.options import Options

    if not dry_run:
        # Kernels load, or compile at the first use, while the plan is made.
        Thread(target=_warm).start()
    conversion = plan(source, target, Options(**options, keep_scales=not no_scales))
    if dry_run:
        from gptoss_convert.estimate import estimate_seconds

        summary = conversion.summary() | {"estimated_seconds": estimate_seconds(conversion)}
        _print(summary, report.conversion(summary), as_json)
        return
    from gptoss_convert.run import run

    if verbose:
        click.echo(report.conversion(conversion.summary()), err=True)
    done = run(conversion, progress.for_terminal(quiet)).summary()
    _print(done, report.finished(done), as_json)


@cli.command(epilog=_EPILOG)
@click.argument("path", type=_PATH)
@click.option(
    "--from",
    "source_format",
    type=click.Choice(_FORMATS),
    help="Format to read, where PATH holds several.",
)
@_iteration
@_config
@_vocab_size
@_json
def inspect(
    path: Path,
    *,
    source_format: str | None,
    iteration: int | None,
    config: Path | None,
    vocab_size: int | None,
    as_json: bool,
) -> None:
    """Tell what the checkpoint in PATH is: format, size, encoding, anything odd. Headers only.

    \b
    gptoss-convert inspect gpt-oss-20b
    """
    from gptoss_convert.checkpoint import Choices
    from gptoss_convert.inspection import inspect

    choices = Choices(source_format, True, iteration, config, vocab_size)
    summary = inspect(path, choices).summary()
    _print(summary, report.inspection(summary), as_json)


@cli.command(epilog=_EPILOG)
@click.argument("path", type=_PATH)
@click.option("--read-data", is_flag=True, help="Read every byte, not headers only.")
@click.option("--read-data-subset", type=Share(), help="Read so much of the weights, as 5%.")
@click.option("--seed", type=int, help="Chooses the subset.  [default: another every time]")
@click.option(
    "--from",
    "source_format",
    type=click.Choice(_FORMATS),
    help="Format to read, where PATH holds several.",
)
@_iteration
@_config
@_vocab_size
@_strict
@_workers
@click.option("--max-memory", type=Size(), default="4GB", help="Limit that buffers must fit in.")
@_json
@_quiet
def check(
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
    gptoss-convert check gpt-oss-20b
    gptoss-convert check gpt-oss-20b --read-data
    """
    from gptoss_convert.check import Reading, check
    from gptoss_convert.checkpoint import Choices

    share = 1.0 if read_data else read_data_subset or 0.0
    choices = Choices(source_format, False, iteration, config, vocab_size, strict)
    reading = Reading(share, seed, workers, max_memory)
    found = check(path, reading, choices, progress.for_terminal(quiet))
    _print(found.summary(), report.check(found.summary()), as_json)
    found.require_intact()


@cli.command(epilog=_EPILOG)
@click.argument("source", type=_PATH)
@click.argument("target", type=_PATH)
@click.option(
    "--level",
    type=click.Choice(["header", "values", "logits", "oracle"]),
    default="logits",
    help="How deep to look; each level includes those before it.",
)
@click.option(
    "--from-source",
    "source_format",
    type=click.Choice(_FORMATS),
    help="Format to read, where SOURCE holds several.",
)
@click.option(
    "--from-target",
    "target_format",
    type=click.Choice(_FORMATS),
    help="Format to read, where TARGET holds several.",
)
@click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    help="Where to compute logits; auto takes a GPU if there is one.",
)
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bf16"]),
    default="float32",
    help="What to compute logits in; bf16 is faster and coarser.",
)
@click.option(
    "--tokens",
    type=_PATH,
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
    type=click.Choice(["lossless", "float32", "bfloat16"]),
    default="lossless",
    help="What still counts as the same; beyond lossless the logits decide, not the values.",
)
@_workers
@click.option("--max-memory", type=Size(), default="4GB", help="Limit that buffers must fit in.")
@click.option("--json", "json_file", type=_PATH, help="Write the whole result there; - is stdout.")
@click.option("--junit", type=_PATH, help="Write the levels there as JUnit test cases.")
@_quiet
@click.pass_context
def verify(
    context: click.Context,
    source: Path,
    target: Path,
    *,
    json_file: Path | None,
    junit: Path | None,
    quiet: bool,
    **options: Any,
) -> None:
    """Tell whether SOURCE and TARGET, checkpoints in any formats, are the same model.

    \b
    gptoss-convert verify gpt-oss-20b gpt-oss-20b-bf16
    gptoss-convert verify gpt-oss-20b megatron --level values
    """
    from gptoss_convert.verify.gate import Options, verify_checkpoints

    done = verify_checkpoints(source, target, Options(**options), progress.for_terminal(quiet))
    summary = done.summary()
    if junit:
        junit.write_text(report.junit(summary), encoding="utf-8")
    if json_file and str(json_file) != "-":
        json_file.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _print(summary, report.verification(summary), str(json_file) == "-")
    context.exit(0 if done.same else 1)


@cli.command(epilog=_EPILOG)
@click.argument("target", type=_PATH)
@click.option(
    "--model",
    type=click.Choice(["tiny", "20b", "120b"]),
    default="tiny",
    help="Which model's shapes.",
)
@click.option("--layers", type=click.IntRange(1), help="Fewer layers than the model has.")
@click.option("--format", type=click.Choice(_FORMATS), default="hf", help="Format of TARGET.")
@click.option(
    "--dtype",
    type=click.Choice(["keep", "mxfp4", "bf16"]),
    default="keep",
    help="Encoding of the expert weights; keep is MXFP4.",
)
@click.option(
    "--shards",
    type=click.Choice(["auto", "size", "published"]),
    default="auto",
    help="Files of TARGET: as published for a whole 20b or 120b, else by size.",
)
@click.option("--seed", type=int, default=0, help="Chooses the values.")
@_workers
@_overwrite
@_json
@_quiet
def synth(target: Path, *, as_json: bool, quiet: bool, **options: Any) -> None:
    """Write a synthetic checkpoint: published names, shapes and files, realistic random values.

    \b
    gptoss-convert synth tiny
    gptoss-convert synth gpt-oss-20b --model 20b
    """
    from gptoss_convert.synth import synth

    done = synth(target, progress=progress.for_terminal(quiet), **options).summary()
    _print(done, report.finished(done), as_json)


def _warm() -> None:
    from gptoss_convert.execute import warm

    warm()


def _print(summary: Mapping[str, Any], text: str, as_json: bool) -> None:
    click.echo(json.dumps(summary, indent=2) if as_json else text)

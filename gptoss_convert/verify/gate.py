"""The gate: are two checkpoints the same model? Four levels, each includes those before it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gptoss_convert.compare.config_diff import numbers_that_differ
from gptoss_convert.compare.values import compare_values
from gptoss_convert.compare.values_report import Difference, ValuesReport
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.config import Config
from gptoss_convert.hub.sources import open_source
from gptoss_convert.machine.progress import SILENT, Progress
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.verify.result import LEVELS, Level, Verification, VerifyOptions


def verify_checkpoints(
    source: str | Path,
    target: str | Path,
    options: VerifyOptions | None = None,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> Verification:
    """Compare two checkpoints of any formats: directories, or repositories on the Hub.

    All of `ranks` have the same result.

    Raises what opening them raises, UsageError where a level lacks its libraries, ResourceError
    where memory is too small, RankError if another rank failed; a difference is no error but the
    result.
    """
    options = options or VerifyOptions()
    if options.level not in LEVELS:
        raise UsageError(f"--level {options.level}: choose {', '.join(LEVELS)}")
    began = time.monotonic()
    weights = None if options.level == "header" else progress
    ours = open_source(source, options.source, weights, options.revision)
    theirs = open_source(target, options.target, weights)
    levels = [_header(ours, theirs, began)]
    later: dict[str, Callable[[], Level]] = {
        "values": lambda: _values(ours, theirs, options, progress, ranks),
        "logits": lambda: _logits(ours, theirs, options, progress, ranks),
        "oracle": lambda: _oracle(ours, theirs, options, progress, ranks),
    }
    for name in LEVELS[1 : LEVELS.index(options.level) + 1]:
        # Of models of different sizes there is nothing to hold side by side.
        if not levels[0].same:
            break
        levels.append(later[name]())
    return Verification(_side(ours), _side(theirs), options.limits, tuple(levels))


def _side(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "path": checkpoint.place,
        "format": checkpoint.label,
        "model": checkpoint.config.size,
        "bytes": sum(chunk.nbytes for chunk in checkpoint.chunks),
        "notes": list(checkpoint.notes),
    }


def _header(ours: Checkpoint, theirs: Checkpoint, began: float) -> Level:
    """Both are complete and well-shaped, or opening them raised; are their numbers equal?"""
    for checkpoint in (ours, theirs):
        checkpoint.extents()
    findings = tuple(config_differences(ours.config, theirs.config))
    text = "both complete and consistent, configurations equal"
    return Level("header", not findings, time.monotonic() - began, text, findings)


def config_differences(ours: Config, theirs: Config) -> list[str]:
    """Each number of the two models that differs, in words."""
    found = numbers_that_differ(ours, theirs)
    return [f"{name} is {a} in SOURCE, {b} in TARGET" for name, (a, b) in found.items()]


def _values(
    ours: Checkpoint, theirs: Checkpoint, options: VerifyOptions, progress: Progress, ranks: Ranks
) -> Level:
    began = time.monotonic()
    report = compare_values(
        ours,
        theirs,
        layers=options.layers,
        workers=options.workers,
        max_memory=options.max_memory,
        statistics=options.statistics,
        progress=progress,
        ranks=ranks,
    )
    text = f"all {report.elements:,} values equal, bit by bit"
    findings = tuple(describe(one) for one in _ordered(report))
    return Level("values", report.same, time.monotonic() - began, text, findings, report.summary())


def _ordered(report: ValuesReport) -> list[Difference]:
    """First what the input meets first: no layer, then layer by layer."""
    return sorted(
        report.differences, key=lambda one: (-1 if one.layer is None else one.layer, one.parameter)
    )


_BLOCKS = {"gate_up": "experts", "down": "experts", "mlp": "router", "norm": "final norm"}


def describe(difference: Difference) -> str:
    """One parameter's difference in words: where it is, what it looks like, how much."""
    block = difference.parameter.partition(".")[0]
    block = _BLOCKS.get(block, block)
    layer = difference.layer
    place = block if layer is None else f"layer {layer} {block}"
    names = ", ".join(difference.target_tensors[:2])
    if layer is not None and str(layer) not in names.split("."):
        names += f"[{layer}]"
    worst = difference.worst
    parts = (
        f"{place}: {names} differs",
        f"looks {difference.looks}" if difference.looks else "",
        f"{difference.differing:,} of {difference.elements:,} values",
        f"worst at {list(worst.index)}: {worst.source:g} in SOURCE, {worst.target:g} in TARGET",
    )
    return "; ".join(part for part in parts if part)


def _logits(
    ours: Checkpoint, theirs: Checkpoint, options: VerifyOptions, progress: Progress, ranks: Ranks
) -> Level:
    _need_torch()
    from gptoss_convert.verify.logits_level import logits_level

    return logits_level(ours, theirs, options, progress, ranks)


def _oracle(
    ours: Checkpoint, theirs: Checkpoint, options: VerifyOptions, progress: Progress, ranks: Ranks
) -> Level:
    _need_torch()
    from gptoss_convert.verify.oracle_level import oracle_level

    return oracle_level(ours, theirs, options, progress, ranks)


def _need_torch() -> None:
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise UsageError(
            "--level logits needs torch (pip install 'gptoss-convert[verify]'); "
            f"--level values needs nothing more: {error}"
        ) from None

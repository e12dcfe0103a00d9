"""The values level of the gate: every parameter of both sides, bit by bit."""

from __future__ import annotations

import time

from gptoss_convert.compare.values import compare_values
from gptoss_convert.compare.values_report import Difference, ValuesReport
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import Ranks
from gptoss_convert.verify.result import Level, VerifyOptions


def values_level(
    ours: Checkpoint, theirs: Checkpoint, options: VerifyOptions, progress: Progress, ranks: Ranks
) -> Level:
    """Are all values equal, and if not, what does each difference look like?"""
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

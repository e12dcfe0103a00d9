"""The header level of the gate: is either side complete, and are both models' numbers equal?"""

from __future__ import annotations

import time

from gptoss_convert.compare.config_diff import numbers_that_differ
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.config import Config
from gptoss_convert.machine.progress import Progress
from gptoss_convert.machine.ranks import Ranks
from gptoss_convert.verify.result import Level, VerifyOptions


def header_level(
    ours: Checkpoint, theirs: Checkpoint, options: VerifyOptions, progress: Progress, ranks: Ranks
) -> Level:
    """Both are complete and well-shaped, or opening them raised; are their numbers equal?"""
    began = time.monotonic()
    for checkpoint in (ours, theirs):
        checkpoint.extents()
    findings = tuple(config_differences(ours.config, theirs.config))
    text = "both complete and consistent, configurations equal"
    return Level("header", not findings, time.monotonic() - began, text, findings)


def config_differences(ours: Config, theirs: Config) -> list[str]:
    """Each number of the two models that differs, in words."""
    found = numbers_that_differ(ours, theirs)
    return [f"{name} is {a} in SOURCE, {b} in TARGET" for name, (a, b) in found.items()]

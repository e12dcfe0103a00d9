"""The options of `diff`."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_convert.formats.option import memory_option, workers_option


@dataclass(frozen=True)
class DiffOptions:
    """What a comparison may take of the machine."""

    workers: int | None = workers_option()
    max_memory: int | None = memory_option()

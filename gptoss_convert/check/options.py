"""How much of a checkpoint to read when it is checked."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_convert.formats.option import memory_option, option, workers_option


@dataclass(frozen=True)
class Reading:
    """How much of the weights to read."""

    share: float = 0.0
    """Of the layers of all parameters; 1 reads every byte, 0 headers only."""
    seed: int | None = option(None, "Chooses the subset.", shown="another every time")
    workers: int | None = workers_option()
    max_memory: int | None = memory_option()


HEADERS = Reading()

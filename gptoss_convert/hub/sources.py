"""SOURCE: a directory, or a repository on the Hub of which the headers are fetched."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gptoss_convert.formats.checkpoint import Checkpoint, Choices
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.formats.repository import Repository
from gptoss_convert.hub.names import repository
from gptoss_convert.machine.progress import Progress


def locate(source: str | Path, revision: str | None = None) -> Path | Repository:
    """The directory or repository that SOURCE names; an existing path always wins."""
    return repository(source, revision) or Path(source)


@contextmanager
def opening(source: Path | Repository, choices: Choices) -> Iterator[Checkpoint]:
    """Open SOURCE header by header; a repository's headers are there inside the context only.

    Its weights are not: see `with_weights`. Raises what `open_checkpoint` raises, and NetworkError.
    """
    if isinstance(source, Path):
        yield open_checkpoint(source, choices)
        return
    from gptoss_convert.hub.client import resolve
    from gptoss_convert.hub.outline import opened, outline

    listing = resolve(source)
    with outline(listing, choices.format) as root:
        yield opened(listing, root, choices)


def with_weights(checkpoint: Checkpoint, choices: Choices, progress: Progress) -> Checkpoint:
    """The checkpoint with its weights at hand: a repository's are downloaded to the cache."""
    if checkpoint.repository is None:
        return checkpoint
    from gptoss_convert.hub.client import resolve
    from gptoss_convert.hub.fetch import snapshot, weight_files
    from gptoss_convert.hub.outline import opened

    listing = resolve(checkpoint.repository)
    root = snapshot(listing, checkpoint, weight_files(checkpoint), progress)
    return opened(listing, root, replace(choices, format=checkpoint.format))

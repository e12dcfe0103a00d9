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
def opening(
    source: Path | Repository, choices: Choices, weights: Progress | None = None
) -> Iterator[Checkpoint]:
    """Open SOURCE header by header; a repository's headers are there inside the context only.

    With `weights`, which is told of the download, its weights are there, too, and stay in the
    cache. Raises what `open_checkpoint` raises, and NetworkError.
    """
    if isinstance(source, Path):
        yield open_checkpoint(source, choices)
        return
    from gptoss_convert.hub.client import resolve
    from gptoss_convert.hub.outline import opened, outline

    listing = resolve(source)
    with outline(listing, choices.format) as root:
        found = opened(listing, root, choices)
        if weights is not None:
            from gptoss_convert.hub.fetch import snapshot, weight_files

            place = snapshot(listing, found, weight_files(found), weights)
            found = opened(listing, place, replace(choices, format=found.format))
        yield found


def open_source(
    source: str | Path,
    choices: Choices,
    weights: Progress | None = None,
    revision: str | None = None,
) -> Checkpoint:
    """The checkpoint that SOURCE names; of a repository only headers, unless `weights` are needed.

    See `opening`.
    """
    with opening(locate(source, revision), choices, weights) as found:
        return found

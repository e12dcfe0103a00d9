"""An adapter's directory, wherever it is: on disk, or in a repository on the Hub.

What reads adapters is loaded where one is named: most runs have none.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from gptoss_convert.containers.paths import Followed
from gptoss_convert.errors import InputError
from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.hub.names import repository
from gptoss_convert.machine.progress import SILENT, Progress

if TYPE_CHECKING:
    from gptoss_convert.hub.listing import Listing

_BESIDE = ("README.md", "automodel_peft_config.json")


def adapter_directory(name: str | Path, progress: Progress = SILENT) -> Path:
    """The directory that a name stands for; a repository's files are downloaded to the cache.

    Raises what finding and downloading a repository raises.
    """
    found = repository(name)
    if found is None:
        return Path(name)
    from gptoss_convert.hub.client import resolve

    return _downloaded(resolve(found), progress)


def _downloaded(listing: Listing, progress: Progress) -> Path:
    from gptoss_convert.formats.adapters.stored import CONFIG, PICKLE, WEIGHTS
    from gptoss_convert.hub.fetch import in_cache

    found = listing.repository
    if lost := [one for one in (CONFIG, WEIGHTS) if one not in listing.files]:
        pickled = f"; {PICKLE} is pickled, and never loaded" if PICKLE in listing.files else ""
        raise InputError(f"{found}: no adapter: lacks {' and '.join(lost)}{pickled}")
    names = [one for one in (CONFIG, WEIGHTS, *_BESIDE) if one in listing.files]
    return in_cache(listing, names, progress)


def adapter_at(name: str, revision: str | None = None, follow_links: bool = False) -> Path | None:
    """The directory of the adapter that a name stands for, None if it stands for anything else."""
    from gptoss_convert.formats.adapters.stored import CONFIG, is_adapter

    found = repository(name, revision)
    if found is None:
        root = Followed(name) if follow_links else Path(name)
        return root if is_adapter(root) else None
    from gptoss_convert.hub.client import resolve

    # Asked for once more by whoever opens the model: one request of a few kB.
    listing = resolve(found)
    return _downloaded(listing, SILENT) if CONFIG in listing.files else None


def with_adapter(
    base: Checkpoint,
    options: AdapterOptions,
    progress: Progress = SILENT,
    follow_links: bool = False,
) -> Checkpoint:
    """The base with the adapter on it, if there is one; raises what opening the adapter raises."""
    options.check_adapter_options()
    if options.adapter is None:
        return base
    from gptoss_convert.formats.adapters.evidence import base_remarks
    from gptoss_convert.formats.adapters.opening import open_adapter

    root = adapter_directory(options.adapter, progress)
    root = Followed(root) if follow_links else root
    adapter = open_adapter(root, base.config.numbers, options)
    if found := repository(options.adapter):
        # The cache's directory of a commit has its name.
        adapter = replace(adapter, repository=f"hf://{found.name}@{root.name}")
    # Of a repository only headers are here.
    proof = base_remarks(adapter, base.extents()) if base.outline is None else ()
    notes = tuple(f"adapter {adapter.place}: {note}" for note in (*adapter.notes, *proof))
    return replace(base, adapter=adapter, notes=(*base.notes, *notes))

"""What a repository's weights are read from: a snapshot in the cache, or a stream."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.hub.bars import PIECE, bar_type
from gptoss_convert.hub.cache import cache_folder, cached, remember, require_room
from gptoss_convert.hub.client import download, resolve
from gptoss_convert.hub.listing import Listing, require_same_beginning
from gptoss_convert.hub.outline import files_of, is_weights
from gptoss_convert.hub.stream import AT_ONCE, ShardStream
from gptoss_convert.machine.files import Places
from gptoss_convert.machine.progress import Advance, Progress


@contextmanager
def fetched(
    source: Checkpoint, files: Set[FileRef], folder: Path | None, progress: Progress
) -> Iterator[tuple[Places, ShardStream | None]]:
    """Where these files of a repository's checkpoint lie: all of them, or all but its shards.

    Shards that the cache has not come through the stream: one by one into `folder`, if there is
    one, else into the cache.
    """
    if source.repository is None or source.outline is None:
        raise UsageError(f"{source.place}: not a repository on the Hub")
    listing, outline = resolve(source.repository), source.outline
    weights = weight_files(source)
    missing = [name for name in weights if cached(listing, name) is None]
    streamed = bool(folder or missing)
    root = snapshot(listing, source, frozenset() if streamed else weights, progress)
    mine = {file.root for file in files if file.root.is_relative_to(outline)}
    places = {place: root / place.relative_to(outline) for place in mine}
    shards = {
        file: name
        for file in files
        if file.root in mine and (name := file.path.relative_to(outline).as_posix()) in weights
    }
    yield places, ShardStream(listing, shards, places, folder) if streamed else None
    if not folder and all(cached(listing, name) for name in missing):
        remember(listing)


def snapshot(listing: Listing, source: Checkpoint, weights: Set[str], progress: Progress) -> Path:
    """The cache's directory of the pinned commit, with these files of weights in it and all others
    of the checkpoint."""
    names = [n for n in files_of(listing, source.format) if n in weights or not is_weights(n)]
    return in_cache(listing, names, progress)


def in_cache(listing: Listing, names: Sequence[str], progress: Progress) -> Path:
    """The cache's directory of the pinned commit, with these files in it."""
    missing = [name for name in names if cached(listing, name) is None]
    folder = cache_folder(listing)
    if missing:
        total = require_room(listing, missing)
        pieces = sum(-(-listing.files[name] // PIECE) for name in missing)
        with progress.phase("downloading", total, pieces) as advance:
            _download_all(listing, missing, advance)
        remember(listing)
    root = folder / "snapshots" / str(listing.repository.commit)
    for name in names:
        require_same_beginning(listing, name, root / name)
    return root


def weight_files(source: Checkpoint) -> frozenset[str]:
    """The files of the repository that hold the checkpoint's tensors."""
    outline = source.outline or source.root
    mine = (file.path for file in source.files() if file.path.is_relative_to(outline))
    return frozenset(file.relative_to(outline).as_posix() for file in mine)


def _download_all(listing: Listing, names: list[str], advance: Advance) -> None:
    """Download in a few threads; the first error stops all, and so does leaving."""
    queue: SimpleQueue[str] = SimpleQueue()
    for name in names:
        queue.put(name)
    stop = threading.Event()
    errors: list[BaseException] = []
    bar = bar_type(advance, stop)

    def work() -> None:
        try:
            while not stop.is_set():
                download(listing, queue.get_nowait(), bar)
        except Empty:
            return
        except BaseException as error:
            errors.append(error)
            stop.set()

    # Daemons: a download that does not notice the stop must not keep the program from leaving.
    threads = [threading.Thread(target=work, daemon=True) for _ in range(AT_ONCE)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            while thread.is_alive():
                thread.join(0.2)
    finally:
        stop.set()
    if errors:
        raise errors[0]

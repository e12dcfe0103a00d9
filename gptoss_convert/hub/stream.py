"""Shards on demand: steps are done while other shards are still on their way.

They come into the client's cache and stay there, or one by one into a folder, to be dropped when
their steps are done.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.engine.steps import Plan
from gptoss_convert.errors import NetworkError
from gptoss_convert.formats import sidecar
from gptoss_convert.hub.bars import bar_type
from gptoss_convert.hub.cache import cached, require_room
from gptoss_convert.hub.client import download
from gptoss_convert.hub.listing import Listing, require_same_beginning
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.files import Places, SourceFiles
from gptoss_convert.machine.private import make_marked, remove_marked

AT_ONCE = 4
"""Files that are downloaded into the cache side by side."""
_PATIENCE = 2.0
"""Seconds in which downloads may notice that nobody waits for them any more."""


@dataclass(frozen=True)
class Schedule:
    """In which order shards arrive and steps are done."""

    shards: tuple[FileRef, ...]
    spans: Mapping[int, tuple[int, ...]]
    """By step, the places of its shards in that order, smallest first; empty if it needs none."""

    @property
    def order(self) -> list[int]:
        """The steps: as soon as their last shard is there, those first that free an older one."""

        def due(step: int) -> tuple[int, bool, int]:
            span = self.spans[step] or (-1,)
            return span[-1], span[0] == span[-1], step

        return sorted(self.spans, key=due)

    def may_arrive(self, place: int, left: Iterable[int]) -> bool:
        """Whether a shard may come while these steps are left.

        Before it at most one shard is still being converted: no step is left that could free one
        before that. Shards that only later steps free do not count, or none would ever come.
        """
        before = place - 1
        return not any(
            self.spans[step][0] < before and self.spans[step][-1] <= before
            for step in left
            if self.spans[step]
        )


def schedule(plan: Plan, steps: Iterable[int], streamed: Iterable[FileRef]) -> Schedule:
    """The schedule of these steps; `streamed` are all shards that may be needed."""
    known = set(streamed)
    needed = {
        step: {file for extent in plan.steps[step].sources for file in extent.files} & known
        for step in steps
    }

    # What lies beside the weights is needed throughout: it comes first.
    def urgency(file: FileRef) -> tuple[bool, str]:
        return not sidecar.holds(file.name), file.name

    shards = sorted(set().union(*needed.values()), key=urgency)
    places = {file: place for place, file in enumerate(shards)}
    spans = {step: tuple(sorted(places[file] for file in files)) for step, files in needed.items()}
    return Schedule(tuple(shards), spans)


class ShardStream:
    """A byte source whose shards are on their way; a folder holds at most two adjacent ones."""

    def __init__(
        self, listing: Listing, shards: Mapping[FileRef, str], places: Places, folder: Path | None
    ) -> None:
        """Nothing is downloaded before `begin`; the shards, by name in the repository, come into
        `folder` or else into the cache, and all other files lie in `places`."""
        self._listing = listing
        self._folder = folder
        self._paths = shards
        self._others = SourceFiles(places)
        self._files: dict[FileRef, SourceFiles] = {}
        self._left: set[int] = set()
        self._schedule = Schedule((), {})
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.interrupt()
        until = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0))
        self._others.__exit__(*failure)
        for file in [*self._files]:
            self._drop(file)
        if self._folder:
            remove_marked(self._folder)

    def begin(self, plan: Plan, steps: Sequence[int]) -> Sequence[int]:
        """Start downloading what these steps need; returns the order to do them in."""
        if self._folder:
            make_marked(self._folder)
        self._schedule = schedule(plan, steps, self._paths)
        self._left = set(steps)
        if not self._folder:
            paths = (self._paths[file] for file in self._schedule.shards)
            missing = [path for path in paths if cached(self._listing, path) is None]
            require_room(self._listing, missing)
        due = iter(enumerate(self._schedule.shards))
        # Daemons: a download that does not notice the stop must not keep the program from leaving.
        self._threads = [
            threading.Thread(target=self._arrive, args=(due,), name="download", daemon=True)
            for _ in range(1 if self._folder else AT_ONCE)
        ]
        for thread in self._threads:
            thread.start()
        return self._schedule.order

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Fill the arena at `position`, once the shard is there."""
        if file not in self._paths:
            self._others.read(file, offset, nbytes, arena, position)
            return
        with self._changed:
            while file not in self._files:
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise NetworkError(f"{self._paths[file]}: download given up")
                self._changed.wait()
            files = self._files[file]
        files.read(file, offset, nbytes, arena, position)

    def finished(self, steps: Iterable[int]) -> None:
        """These steps are on the disk: drop the shards that no other step needs."""
        with self._changed:
            self._left.difference_update(steps)
            spans = self._schedule.spans
            needed = {place for step in self._left for place in spans[step]}
            for place, file in enumerate(self._schedule.shards):
                if place not in needed and file in self._files:
                    self._files[file].require_unchanged()
                    self._drop(file)
            self._changed.notify_all()

    def interrupt(self) -> None:
        """End the download and free whoever waits for it."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def _arrive(self, due: Iterator[tuple[int, FileRef]]) -> None:
        """Download the shards that are due, in order, each when it may come."""
        bar = bar_type(lambda nbytes: None, self._stop)
        try:
            while (file := self._next(due)) is not None:
                path = self._paths[file]
                lies = cached(self._listing, path)
                lies = lies or download(self._listing, path, bar, self._folder)
                require_same_beginning(self._listing, path, lies)
                root = lies.parents[file.name.count("/")]
                with self._changed:
                    self._files[file] = SourceFiles({file.root: root})
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self, due: Iterator[tuple[int, FileRef]]) -> FileRef | None:
        """The next shard that is due, once it may come."""
        with self._changed:
            place, file = next(due, (0, None))
            while file and self._folder and not self._schedule.may_arrive(place, self._left):
                if self._stop.is_set():
                    break
                self._changed.wait()
            return None if self._stop.is_set() or self._error else file

    def _drop(self, file: FileRef) -> None:
        """Close a shard, and free its place in the folder."""
        self._files.pop(file).__exit__(None, None, None)
        if self._folder:
            (self._folder / self._paths[file]).unlink(missing_ok=True)

"""Shards on demand: each is downloaded when its steps are due, and dropped when they are done."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.engine.steps import Plan
from gptoss_convert.errors import NetworkError
from gptoss_convert.hub.bars import bar_type
from gptoss_convert.hub.client import Listing, cached, download
from gptoss_convert.machine.files import Arena, SourceFiles


@dataclass(frozen=True)
class Schedule:
    """In which order shards arrive and steps are done."""

    shards: tuple[str, ...]
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


def schedule(plan: Plan, steps: Iterable[int], streamed: Iterable[str]) -> Schedule:
    """The schedule of these steps; `streamed` are the names of all shards that may be needed."""
    known = set(streamed)
    needed = {step: {extent.file for extent in plan.steps[step].sources} & known for step in steps}
    # What lies beside the weights is needed throughout: it comes first.
    shards = sorted(set().union(*needed.values()), key=lambda name: (":" not in name, name))
    places = {name: place for place, name in enumerate(shards)}
    spans = {step: tuple(sorted(places[name] for name in names)) for step, names in needed.items()}
    return Schedule(tuple(shards), spans)


class ShardStream:
    """A byte source whose shards come one by one; at most two of adjacent ones lie on the disk."""

    def __init__(self, listing: Listing, conversion: Conversion, root: Path, folder: Path) -> None:
        """Nothing is downloaded before `begin`; `folder` holds shards, `root` all other files."""
        self._listing = listing
        self._folder = folder
        self._roots = conversion.roots
        self._paths = {
            extent.file: path
            for step in conversion.plan.steps
            for extent in step.sources
            if (path := self._path(extent.file, root)) is not None
        }
        self._others = SourceFiles(conversion.roots)
        self._files: dict[str, SourceFiles] = {}
        self._left: set[int] = set()
        self._schedule = Schedule((), {})
        self._changed = threading.Condition()
        self._stop = threading.Event()
        self._error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.interrupt()
        self._others.__exit__(kind, error, trace)
        for name in [*self._files]:
            self._drop(name)
        shutil.rmtree(self._folder, ignore_errors=True)

    def begin(self, plan: Plan, steps: Sequence[int]) -> Sequence[int]:
        """Start downloading what these steps need; returns the order to do them in."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._schedule = schedule(plan, steps, self._paths)
        self._left = set(steps)
        threading.Thread(target=self._arrive, name="download", daemon=True).start()
        return self._schedule.order

    def read(self, name: str, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Fill the arena at `position`, once the shard is there."""
        if name not in self._paths:
            self._others.read(name, offset, nbytes, arena, position)
            return
        with self._changed:
            while name not in self._files:
                if self._error is not None:
                    raise self._error
                if self._stop.is_set():
                    raise NetworkError(f"{self._paths[name]}: download given up")
                self._changed.wait()
            files = self._files[name]
        files.read(self._paths[name], offset, nbytes, arena, position)

    def finished(self, steps: Iterable[int]) -> None:
        """These steps are on the disk: drop the shards that no other step needs."""
        with self._changed:
            self._left.difference_update(steps)
            spans = self._schedule.spans
            needed = {place for step in self._left for place in spans[step]}
            for place, name in enumerate(self._schedule.shards):
                if place not in needed and name in self._files:
                    self._drop(name)
            self._changed.notify_all()

    def interrupt(self) -> None:
        """End the download and free whoever waits for it."""
        self._stop.set()
        with self._changed:
            self._changed.notify_all()

    def _arrive(self) -> None:
        """Download the shards in order, each when it may come."""
        bar = bar_type(lambda nbytes: None, self._stop)
        try:
            for place, name in enumerate(self._schedule.shards):
                with self._changed:
                    while not self._schedule.may_arrive(place, self._left):
                        if self._stop.is_set():
                            return
                        self._changed.wait()
                path = self._paths[name]
                known = cached(self._listing, path)
                if known is None:
                    download(self._listing, path, bar, self._folder)
                root = Path(str(known).removesuffix(path)) if known else self._folder
                with self._changed:
                    self._files[name] = SourceFiles({"": root})
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _drop(self, name: str) -> None:
        """Close a shard and free its place; what the cache holds stays there."""
        self._files.pop(name).__exit__(None, None, None)
        (self._folder / self._paths[name]).unlink(missing_ok=True)

    def _path(self, name: str, root: Path) -> str | None:
        """The path in the repository of a file of the plan, None if it lies elsewhere."""
        prefix, colon, plain = name.rpartition(":")
        path = self._roots[prefix + colon] / plain
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else None

"""The journal of a conversion: which steps are on the disk, so that the same command can resume it.

A line is written only after the bytes it records have been synced. It begins with the CRC-32 of the
rest, so that a line torn by a crash is recognised, and dropped with all that follows.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.containers.budget import RECORD
from gptoss_convert.containers.json_records import from_json, to_json
from gptoss_convert.engine.records import Done
from gptoss_convert.errors import DiskError, UsageError
from gptoss_convert.errors.refusals import disk_error

SCHEMA = 4


@dataclass(frozen=True)
class Publishing:
    """A hidden directory that is complete, and about to become TARGET."""

    manifest: int
    """CRC-32 of its manifest."""
    inode: int
    replaces: int | None
    """The inode of the TARGET that it replaces."""


class Journal:
    """An open journal; `done` are the steps that an interrupted run finished, by number."""

    def __init__(self, descriptor: int, where: str, header: Mapping[str, Any]) -> None:
        """Read what the file at `descriptor` holds, or begin it.

        Raises UsageError that says what differs, if it belongs to another plan.
        """
        self._descriptor = descriptor
        self._where = where
        self.done: dict[int, Done] = {}
        self.published: Publishing | None = None
        """What was about to become TARGET."""
        self._work: int | None = None
        lines, end = _lines(descriptor)
        self._header = {"journal": SCHEMA, **header}
        if lines:
            _require_same(where, lines[0], self._header)
            self._take(lines[1:])
        self._cut(end)
        if not lines:
            self._write([self._header])

    def append(self, batch: Iterable[Done]) -> None:
        """Record finished steps; what they wrote must be on the disk already."""
        batch = list(batch)
        self._write([to_json(done) for done in batch])
        self.done.update((done.step, done) for done in batch)

    def take_over(self, descriptor: int) -> None:
        """Record what another rank's journal of the same plan says, and empty that one."""
        lines, _ = _lines(descriptor)
        if lines:
            _require_same(self._where, lines[0], self._header)
            self._write(lines[1:])
            self._take(lines[1:])
        os.ftruncate(descriptor, 0)

    def working_in(self, inode: int) -> None:
        """Record the hidden directory by its inode: no other is taken for it."""
        if self._work != inode:
            self._write([{"work": inode}])
            self._work = inode

    def publishing(self, publishing: Publishing) -> None:
        """Record that TARGET is written and synced, and will be renamed next."""
        self._write([asdict(publishing)])

    def _take(self, records: Iterable[Any]) -> None:
        for record in records:
            if isinstance(record, dict):
                self._work = _mark([record]) or self._work
                self.published = _publishing(record) or self.published
            elif (done := _done(record)) is not None:
                self.done[done.step] = done

    def _cut(self, end: int) -> None:
        self._end = end
        try:
            os.ftruncate(self._descriptor, end)
        except OSError as error:
            raise disk_error(f"{self._where}: journal", error) from None

    def _write(self, records: list[Any]) -> None:
        text = b"".join(map(_line, records))
        try:
            written = 0
            while written < len(text):
                written += os.pwrite(self._descriptor, text[written:], self._end + written)
            os.fsync(self._descriptor)
        except OSError as error:
            raise disk_error(f"{self._where}: journal", error) from None
        self._end += len(text)


def recorded(path: Path) -> dict[int, Done]:
    """The finished steps of a journal that another process holds; raises DiskError."""
    try:
        with path.open("rb") as file:
            lines, _ = _lines(file.fileno())
    except OSError as error:
        raise DiskError(f"{path}: {error.strerror}") from None
    return {done.step: done for done in map(_done, lines[1:]) if done is not None}


def marked(descriptor: int) -> int | None:
    """The inode of the hidden directory that a journal speaks of."""
    return _mark(_lines(descriptor)[0])


def _mark(records: Iterable[Any]) -> int | None:
    marks = (one.get("work") for one in records if isinstance(one, dict))
    found = [mark for mark in marks if type(mark) is int]
    return found[-1] if found else None


def _publishing(record: Mapping[str, Any]) -> Publishing | None:
    try:
        found = Publishing(**record)
    except TypeError:
        return None
    numbers = (found.manifest, found.inode, found.replaces or 0)
    return found if all(type(number) is int for number in numbers) else None


def _line(record: Any) -> bytes:
    text = json.dumps(record, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def _lines(descriptor: int) -> tuple[list[Any], int]:
    """The intact records and the offset behind the last one."""
    raw = os.pread(descriptor, min(os.fstat(descriptor).st_size, RECORD.nbytes), 0)
    records: list[Any] = []
    end = 0
    for line in raw.splitlines(keepends=True):
        head, _, text = line.partition(b" ")
        text = text.rstrip(b"\n")
        if not line.endswith(b"\n") or head != b"%08x" % zlib.crc32(text):
            break
        try:
            records.append(json.loads(text))
        except (ValueError, RecursionError):
            break
        end += len(line)
    return records, end


def _done(record: Any) -> Done | None:
    """A finished step; None if the record is no such thing: the step is then done again."""
    try:
        return from_json(Done, record)
    except ValueError:
        return None


def _require_same(where: str, before: Any, now: Mapping[str, Any]) -> None:
    if not isinstance(before, dict):
        before = {}
    for part in now:
        then, current = before.get(part), json.loads(json.dumps(now[part]))
        if then == current:
            continue
        changed = f"{part}: {then!r:.80} then, {current!r:.80} now"
        if isinstance(then, dict) and isinstance(current, dict):
            keys = sorted({*then, *current})
            key = next(k for k in keys if then.get(k) != current.get(k))
            changed = f"{part} {key}: {then.get(key)!r} then, {current.get(key)!r} now"
        raise UsageError(
            f"{where}: an unfinished conversion with another plan lies there ({changed}); "
            "finish it with its own options, or pass --restart to discard it"
        )

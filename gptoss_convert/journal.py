"""The journal of a conversion: which steps are on the disk, so that the same command can go on.

A line is written only after the bytes it speaks of have been synced; it begins with the CRC-32 of
the rest, so that a line torn by a crash is recognised and dropped.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import astuple
from typing import Any

from gptoss_convert.errors import UsageError
from gptoss_convert.execute import Done, Region
from gptoss_convert.fingerprint import ScaleStatistics
from gptoss_convert.mxfp4 import EncodeStats

_MAX_BYTES = 1 << 30


class Journal:
    """An open journal; `done` are the steps that an interrupted run finished, by number."""

    def __init__(self, descriptor: int, where: str, header: Mapping[str, Any]) -> None:
        """Read what the file at `descriptor` holds, or begin it.

        Raises UsageError that says what differs, if it belongs to another plan.
        """
        self._descriptor = descriptor
        self._where = where
        self.done: dict[int, Done] = {}
        lines, end = _lines(descriptor)
        if lines:
            _require_same(where, lines[0], header)
            self.done = {done.step: done for done in map(_done, lines[1:])}
        os.ftruncate(descriptor, end)
        self._end = end
        if not lines:
            self._write([dict(header)])

    def append(self, batch: Iterable[Done]) -> None:
        """Record finished steps; what they wrote must be on the disk already."""
        self._write([astuple(done) for done in batch])

    def _write(self, records: list[Any]) -> None:
        for record in records:
            text = json.dumps(record, separators=(",", ":")).encode()
            line = b"%08x %s\n" % (zlib.crc32(text), text)
            self._end += os.pwrite(self._descriptor, line, self._end)
        os.fsync(self._descriptor)


def _lines(descriptor: int) -> tuple[list[Any], int]:
    """The intact records and the offset behind the last one."""
    raw = os.pread(descriptor, _MAX_BYTES, 0)
    records: list[Any] = []
    end = 0
    for line in raw.splitlines(keepends=True):
        head, _, text = line.partition(b" ")
        text = text.rstrip(b"\n")
        if not line.endswith(b"\n") or head != b"%08x" % zlib.crc32(text):
            break
        records.append(json.loads(text))
        end += len(line)
    return records, end


def _done(record: Any) -> Done:
    step, regions, fingerprint, scales, encoded, cast_values = record
    return Done(
        step,
        tuple(Region(*region) for region in regions),
        fingerprint,
        ScaleStatistics(*scales),
        EncodeStats(*encoded),
        cast_values,
    )


def _require_same(where: str, before: Any, now: Mapping[str, Any]) -> None:
    for part in now:
        then = before.get(part) if isinstance(before, dict) else None
        if then == json.loads(json.dumps(now[part])):
            continue
        changed = part
        if isinstance(then, dict) and isinstance(now[part], Mapping):
            keys = sorted({*then, *now[part]})
            key = next(k for k in keys if then.get(k) != now[part].get(k))
            changed = f"{part} {key}: {then.get(key)!r} then, {now[part].get(key)!r} now"
        raise UsageError(
            f"{where}: an unfinished conversion with another plan lies there ({changed}); "
            "finish it with its own options, or pass --restart to discard it"
        )

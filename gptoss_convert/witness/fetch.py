"""Bytes of files as host tensors: read by position in a few threads, ahead of need.

Memory maps would read a page at a time, in the order in which elements are touched; here whole
tensors arrive in large pieces, at the speed of the disk, while the layer before is computed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.errors import DiskError, IntegrityError

PIECE = 16 << 20
"""Bytes that one thread reads at a time."""
MAX_AHEAD = 2_000_000_000
"""Bytes of a checkpoint that are read before they are needed: a layer of the 20b as BF16."""
Box = tuple[tuple[int, int], ...]
"""`[low, high)` on each axis."""


@dataclass(frozen=True, slots=True)
class Run:
    """Bytes that lie together in a file, and where they go."""

    path: Path
    offset: int
    nbytes: int
    position: int


@dataclass(frozen=True)
class Loading:
    """A host tensor of bytes that threads are filling."""

    content: Tensor
    pending: Sequence[Future[None]]

    def wait(self) -> Tensor:
        """The bytes, u8; raises IntegrityError or DiskError that names the file."""
        wait(self.pending)
        for piece in self.pending:
            piece.result()
        return self.content


class Fetcher:
    """Reads runs of bytes onto one device, by way of page-locked memory if that is a GPU.

    At most `max_ahead` bytes are read before they are asked for.
    """

    def __init__(self, device: torch.device, max_ahead: int = MAX_AHEAD):
        self.device = device
        self._pinned = device.type == "cuda"
        self._max_ahead = max_ahead
        self._ahead: dict[tuple[Run, ...], Loading] = {}
        self._open: dict[Path, int] = {}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def ahead(self, wanted: Sequence[tuple[Run, ...]]) -> None:
        """Start to read what `read` will soon be asked for, unless memory is short."""
        wanted = [runs for runs in wanted if runs not in self._ahead]
        held = sum(loading.content.numel() for loading in self._ahead.values())
        if held + sum(run.nbytes for runs in wanted for run in runs) <= self._max_ahead:
            self._ahead |= {runs: self._begin(runs) for runs in wanted}

    def read(self, runs: tuple[Run, ...]) -> Tensor:
        """The bytes of `runs` in one tensor on the device, u8."""
        content = (self._ahead.pop(runs, None) or self._begin(runs)).wait()
        return content.to(self.device, non_blocking=True)

    def _begin(self, runs: tuple[Run, ...]) -> Loading:
        content = torch.empty(length(runs), dtype=torch.uint8, pin_memory=self._pinned)
        view = content.numpy().data
        for run in runs:
            if run.path not in self._open:
                self._open[run.path] = _opened(run.path)
        pieces = [[(self._open[run.path], run) for run in batch] for batch in _batches(runs)]
        return Loading(content, [_threads().submit(_fill, piece, view) for piece in pieces])


def length(runs: Sequence[Run]) -> int:
    """Bytes of the tensor that the runs fill."""
    return max(run.position + run.nbytes for run in runs)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(len(os.sched_getaffinity(0)) + 1, 16), "fetch")


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise IntegrityError(f"{path}: {error.strerror}") from None


def _batches(runs: Sequence[Run]) -> Iterator[list[Run]]:
    """Groups of about PIECE bytes: long runs are cut, short ones are read one after another."""
    batch: list[Run] = []
    held = 0
    for run in runs:
        for start in range(0, run.nbytes, PIECE):
            nbytes = min(PIECE, run.nbytes - start)
            batch.append(Run(run.path, run.offset + start, nbytes, run.position + start))
            held += nbytes
            if held >= PIECE:
                yield batch
                batch, held = [], 0
    if batch:
        yield batch


def _fill(piece: Sequence[tuple[int, Run]], view: memoryview) -> None:
    for descriptor, run in piece:
        done = 0
        while done < run.nbytes:
            room = view[run.position + done : run.position + run.nbytes]
            try:
                count = os.preadv(descriptor, [room], run.offset + done)
            except OSError as error:
                raise DiskError(f"{run.path}: {error.strerror} at byte {run.offset}") from None
            if count == 0:
                raise IntegrityError(
                    f"{run.path}: truncated: expects {run.nbytes} bytes at {run.offset}, "
                    f"found {done}"
                )
            done += count


def runs_of(directory: Path, chunks: Sequence[Chunk], box: Box) -> tuple[Run, ...]:
    """Where the elements of `box` lie, to be laid out as one row-major tensor of its shape."""
    return tuple(run for chunk in chunks for run in _chunk_runs(directory, chunk, box))


def _chunk_runs(directory: Path, chunk: Chunk, box: Box) -> Iterator[Run]:
    held = [(start, start + n) for start, n in zip(chunk.start, chunk.extent, strict=True)]
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(held, box, strict=True)]
    if any(low >= high for low, high in common):
        return
    item = DTYPE_BYTES[chunk.dtype]
    there = _strides(held, item)
    here = _strides(box, item)
    # Trailing axes that both sides hold whole are one run together with the axis before them.
    axis = len(common)
    while axis > 0 and all(common[axis:] == list(side)[axis:] for side in (held, box)):
        axis -= 1
    axis = max(axis, 0)
    nbytes = item
    for low, high in common[axis:]:
        nbytes *= high - low
    path = directory / chunk.file
    for index in product(*(range(low, high) for low, high in common[:axis])):
        corner = (*index, *(low for low, _ in common[axis:]))
        yield Run(
            path,
            chunk.offset + _distance(corner, held, there),
            nbytes,
            _distance(corner, box, here),
        )


def _strides(box: Sequence[tuple[int, int]], item: int) -> list[int]:
    """Bytes from one index to the next on each axis of a row-major box."""
    strides = [item]
    for low, high in reversed(box[1:]):
        strides.append(strides[-1] * (high - low))
    return strides[::-1][: len(box)]


def _distance(index: Sequence[int], box: Sequence[tuple[int, int]], strides: Sequence[int]) -> int:
    return sum((i - low) * step for i, (low, _), step in zip(index, box, strides, strict=True))

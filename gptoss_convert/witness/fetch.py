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
from gptoss_convert.containers.paths import open_file
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import DiskError, IntegrityError

PIECE = 16 << 20
"""Bytes that one thread reads at a time. torch rounds page-locked memory up to powers of two."""
MAX_AHEAD = 2_000_000_000
"""Bytes of a checkpoint that are read before they are needed: a layer of the 20b as BF16."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes that lie together in a file, and where they go."""

    file: FileRef
    offset: int
    nbytes: int
    position: int


@dataclass(frozen=True)
class Loading:
    """Bytes that threads are reading, in pieces of PIECE bytes, the last one shorter."""

    nbytes: int
    whole: Tensor | None
    """Where the pieces lie one after another: on the host, if that is what computes."""
    pieces: Sequence[Future[Tensor]]
    """The pieces; the result raises IntegrityError or DiskError that names the file."""

    def on(self, device: torch.device) -> Tensor:
        """The bytes in one tensor on `device`, u8; raises what reading them raised."""
        wait(self.pieces)
        read = [piece.result() for piece in self.pieces]
        if self.whole is not None:
            return self.whole
        content = torch.empty(self.nbytes, dtype=torch.uint8, device=device)
        for number, piece in enumerate(read):
            content[number * PIECE :][: len(piece)].copy_(piece, non_blocking=True)
        return content


class Fetcher:
    """Reads ranges of bytes onto one device, by way of page-locked memory if that is a GPU.

    At most `max_ahead` bytes are read before they are asked for.
    """

    def __init__(self, device: torch.device, max_ahead: int = MAX_AHEAD):
        self.device = device
        self._pinned = device.type == "cuda"
        self._max_ahead = max_ahead
        self._ahead: dict[tuple[ByteRange, ...], Loading] = {}
        self._open: dict[FileRef, int] = {}

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)

    def ahead(self, wanted: Sequence[tuple[ByteRange, ...]]) -> None:
        """Start to read what `read` will soon be asked for, unless memory is short."""
        wanted = [ranges for ranges in wanted if ranges not in self._ahead]
        held = sum(loading.nbytes for loading in self._ahead.values())
        if held + sum(one.nbytes for ranges in wanted for one in ranges) <= self._max_ahead:
            self._ahead |= {ranges: self._begin(ranges) for ranges in wanted}

    def read(self, ranges: tuple[ByteRange, ...]) -> Tensor:
        """The bytes of `ranges` in one tensor on the device, u8."""
        return (self._ahead.pop(ranges, None) or self._begin(ranges)).on(self.device)

    def _begin(self, ranges: tuple[ByteRange, ...]) -> Loading:
        for one in ranges:
            if one.file not in self._open:
                self._open[one.file] = _opened(one.file)
        nbytes = length(ranges)
        whole = None if self._pinned else torch.empty(nbytes, dtype=torch.uint8)
        pieces: list[Future[Tensor]] = []
        for number, piece in enumerate(_pieces(ranges)):
            start = number * PIECE
            room = None if whole is None else whole[start : start + PIECE]
            there = [(self._open[one.file], one) for one in piece]
            pieces.append(_threads().submit(_read, there, min(PIECE, nbytes - start), room))
        return Loading(nbytes, whole, pieces)


def length(ranges: Sequence[ByteRange]) -> int:
    """Bytes of the tensor that the ranges fill."""
    return max(one.position + one.nbytes for one in ranges)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(len(os.sched_getaffinity(0)) + 1, 16), "fetch")


def _opened(file: FileRef) -> int:
    with open_file(file) as stream:
        return os.dup(stream.fileno())


def _pieces(ranges: Sequence[ByteRange]) -> list[list[ByteRange]]:
    """What goes into each PIECE bytes, with positions in them; long ranges are cut."""
    pieces: list[list[ByteRange]] = [[] for _ in range(-(-length(ranges) // PIECE))]
    for one in ranges:
        done = 0
        while done < one.nbytes:
            number, position = divmod(one.position + done, PIECE)
            nbytes = min(one.nbytes - done, PIECE - position)
            pieces[number].append(ByteRange(one.file, one.offset + done, nbytes, position))
            done += nbytes
    return pieces


def _read(piece: Sequence[tuple[int, ByteRange]], nbytes: int, room: Tensor | None) -> Tensor:
    """Fill a piece: its room, else page-locked memory, which takes time to get."""
    if room is None:
        room = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    _fill(piece, room.numpy().data)
    return room


def _fill(piece: Sequence[tuple[int, ByteRange]], view: memoryview) -> None:
    for descriptor, one in piece:
        done = 0
        while done < one.nbytes:
            room = view[one.position + done : one.position + one.nbytes]
            try:
                count = os.preadv(descriptor, [room], one.offset + done)
            except OSError as error:
                raise DiskError(f"{one.file}: {error.strerror} at byte {one.offset}") from None
            if count == 0:
                raise IntegrityError(
                    f"{one.file}: truncated: expects {one.nbytes} bytes at {one.offset}, "
                    f"found {done}"
                )
            done += count


def ranges_of(
    directory: Path, chunks: Sequence[Chunk], box: Sequence[tuple[int, int]]
) -> tuple[ByteRange, ...]:
    """Where the elements of `box` lie, to be laid out as one row-major tensor of its shape.

    A box is `[low, high)` on each axis.
    """
    return tuple(one for chunk in chunks for one in _chunk_ranges(directory, chunk, box))


def _chunk_ranges(
    directory: Path, chunk: Chunk, box: Sequence[tuple[int, int]]
) -> Iterator[ByteRange]:
    held = [(start, start + n) for start, n in zip(chunk.start, chunk.extent, strict=True)]
    common = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(held, box, strict=True)]
    if any(low >= high for low, high in common):
        return
    item = DTYPE_BYTES[chunk.dtype]
    there = _strides(held, item)
    here = _strides(box, item)
    # Trailing axes that both sides hold whole are one range together with the axis before them.
    axis = len(common)
    while axis > 0 and all(common[axis:] == list(side)[axis:] for side in (held, box)):
        axis -= 1
    axis = max(axis, 0)
    nbytes = item
    for low, high in common[axis:]:
        nbytes *= high - low
    file = FileRef(directory, chunk.file, chunk.identity)
    for index in product(*(range(low, high) for low, high in common[:axis])):
        corner = (*index, *(low for low, _ in common[axis:]))
        yield ByteRange(
            file,
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

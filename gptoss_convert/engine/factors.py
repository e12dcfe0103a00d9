"""The halves of an adapter's updates in memory: read when they are first needed, kept for a while.

They are small beside the weights, but the part that one step needs may be scattered over a whole
tensor. So both halves of an update are read as a whole, and kept for the steps that follow.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.containers.paths import open_file
from gptoss_convert.errors import IntegrityError
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.layouts.updates import Factor, Update, kept_bytes
from gptoss_convert.machine.arena import Arena

F32 = NDArray[np.float32]
_PIECE = 4 << 20
_DTYPES = {"BF16": np.uint16, "F16": np.float16, "F32": np.float32}


@dataclass
class _Held:
    """A factor that one thread reads, while others that want it wait."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    values: F32 | None = None


class Factors:
    """Factors as float32 arrays in the order of their axes; safe to share between threads.

    All are kept if they are few, else those that were used last.
    """

    def __init__(self, updates: Sequence[Update]) -> None:
        self._most, _ = kept_bytes(updates)
        self._held: OrderedDict[Factor, _Held] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __getitem__(self, factor: Factor) -> F32:
        """The values of a factor; raises IntegrityError for a file that has become shorter."""
        with self._lock:
            if factor not in self._held:
                self._bytes += factor.nbytes
            held = self._held[factor] = self._held.pop(factor, None) or _Held()
            while self._bytes > self._most:
                oldest, _ = self._held.popitem(last=False)
                self._bytes -= oldest.nbytes
        with held.lock:
            if held.values is None:
                held.values = read_factor(factor)
            return held.values


def read_factor(factor: Factor) -> F32:
    """A factor's values as float32, in the order of its axes; raises IntegrityError for NaN."""
    # Memory of its own: threads' heaps would keep it, once it is free, for themselves.
    memory = Arena(factor.nbytes).memory
    values = np.frombuffer(memory, np.float32, math.prod(factor.lengths)).reshape(factor.lengths)
    for extent in factor.extents:
        for part, content in pieces(extent):
            inside = zip(part.box, factor.start, strict=True)
            values[tuple(slice(lo - first, hi - first) for (lo, hi), first in inside)] = content
    if not np.isfinite(values).all():
        raise IntegrityError(f"{factor.extents[0].file}: {factor.tensor}: holds NaN or infinities")
    return values


def pieces(extent: Extent) -> Iterator[tuple[Extent, F32]]:
    """An extent's values as float32, in parts whose bytes lie close to each other."""
    box = extent.box
    longest = max(range(len(box)), key=lambda i: (box[i][1] - box[i][0] > 1, extent.strides[i]))
    lo, hi = box[longest]
    if extent.span(box) > _PIECE and hi - lo > 1:
        middle = (lo + hi) // 2
        for span in ((lo, middle), (middle, hi)):
            half = (*box[:longest], span, *box[longest + 1 :])
            yield from pieces(replace(extent, box=half))
        return
    yield extent, _read(extent)


def _read(extent: Extent) -> F32:
    first, span = extent.at(extent.box), extent.span(extent.box)
    content = bytearray(span)
    with open_file(extent.file) as file:
        done = 0
        while done < span:
            count = os.preadv(file.fileno(), [memoryview(content)[done:]], first + done)
            if count == 0:
                raise IntegrityError(f"{extent.file}: truncated: ends within {extent.tensor}")
            done += count
    shape = [hi - lo for lo, hi in extent.box]
    raw = np.ndarray(shape, _DTYPES[extent.dtype], content, 0, extent.strides)
    if extent.dtype == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32)

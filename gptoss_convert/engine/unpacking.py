"""Quantised tensors read as the bytes of their BF16 values, which are decoded when they are read.

A step reads such a tensor like any other, although no file holds the decoded values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from gptoss_convert.codecs.decoders.decoder import Decoder, Member, Stored, load_decoder
from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import CodecError, IntegrityError
from gptoss_convert.layouts.extents import Extent
from gptoss_convert.machine.arena import PAGE, Arena
from gptoss_convert.machine.files import ByteSource

_PIECE = 1 << 19
"""Values decoded at once: what is made of them on the way stays within a few megabytes."""
_FLOATS = {"F16": np.float16, "F32": np.float32}
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def array_type(dtype: str) -> type[np.generic]:
    """The numpy type of a stored dtype; what numpy does not compute with is carried as its bits."""
    return _FLOATS.get(dtype) or _BITS[DTYPE_BYTES[dtype]]


class Unpacker:
    """Decodes for one worker, into whose memory it also reads what is encoded."""

    def __init__(self, files: ByteSource) -> None:
        self._files = files
        self._arena = Arena(0)

    def of(self, extent: Extent) -> ByteSource:
        """The bytes of an extent's values."""
        packed = extent.packed
        assert packed is not None
        members = dict(packed.members)
        stored = Stored(
            (),
            {name: Member(chunk.dtype, chunk.shape) for name, chunk in members.items()},
            dict(packed.numbers),
        )
        decoder = load_decoder(packed.decoder)
        shape = decoder.shape(stored.members, stored.numbers)
        stored = Stored(shape, stored.members, stored.numbers)
        return _Decoded(extent, decoder, stored, members, self)

    def elements(self, extent: Extent, chunk: Chunk, first: int, last: int) -> npt.NDArray[Any]:
        """Elements of a stored tensor, in memory of their own."""
        size = DTYPE_BYTES[chunk.dtype]
        offset, nbytes = chunk.offset + first * size, (last - first) * size
        self._arena.reset(nbytes + 2 * PAGE)
        position = self._arena.take(nbytes, offset)
        file = FileRef(extent.file.root, chunk.file, chunk.identity)
        self._files.read(file, offset, nbytes, self._arena, position)
        raw = bytes(memoryview(self._arena.memory)[position : position + nbytes])
        return np.frombuffer(raw, array_type(chunk.dtype))


@dataclass(frozen=True, slots=True)
class _Decoded:
    extent: Extent
    decoder: Decoder
    stored: Stored
    members: dict[str, Chunk]
    unpacker: Unpacker

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        """Fill the arena with the bytes of decoded values; both ends are those of values."""
        first, last = offset // 2, (offset + nbytes) // 2
        values = np.ndarray(last - first, np.uint16, arena.memory, position)
        for start in range(first, last, _PIECE):
            end = min(start + _PIECE, last)
            try:
                found = self.decoder.decode(self.stored, start, end, self._elements)
            except CodecError as error:
                place = f"{file}: {self.extent.tensor}"
                raise IntegrityError(f"{place}: values {start}..{end - 1}: {error}") from None
            values[start - first : end - first] = found

    def _elements(self, member: str, first: int, last: int) -> npt.NDArray[Any]:
        chunk = self.members[member]
        count = chunk.nbytes // DTYPE_BYTES[chunk.dtype]
        # A last block may be cut short.
        return self.unpacker.elements(self.extent, chunk, first, min(last, count))

"""The bytes around a tensor's data in an item: a `torch.save` archive with a hole for the data.

The archive is written by hand because it must be known before the data is: record sizes stand in
the local headers, nothing follows the data but the central directory, and the checksum of the data
is left zero. torch never checks it; `unzip -t` and Python's zipfile, which do, complain about the
record `archive/data/0` alone.
"""

from __future__ import annotations

import math
import struct
import zlib
from dataclasses import dataclass

from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.containers.torch_dist import emit, zips
from gptoss_convert.errors import UsageError

RECORD_ALIGNMENT = 64
"""torch aligns the data of each record so, counted from the start of the archive."""
MAX_DATA_BYTES = (1 << 32) - (1 << 16)
"""Beyond, an archive needs zip64 fields."""

_STORAGES = {
    "BF16": "torch.BFloat16Storage",
    "F16": "torch.HalfStorage",
    "F32": "torch.FloatStorage",
    "U8": "torch.ByteStorage",
}
_DATE_1980 = 0x21
_PADDING_TAG = b"FB"


@dataclass(frozen=True, slots=True)
class ItemForm:
    """Everything of an item but its data: `prefix`, then `nbytes` of data, then `suffix`."""

    prefix: bytes
    nbytes: int
    suffix: bytes

    @property
    def length(self) -> int:
        """Bytes of the whole item."""
        return len(self.prefix) + self.nbytes + len(self.suffix)


def item_form(dtype: str, extent: tuple[int, ...]) -> ItemForm:
    """Return the form of an item that holds one row-major tensor.

    Raises UsageError for a tensor without elements, or of more than MAX_DATA_BYTES.
    """
    nbytes = math.prod(extent) * DTYPE_BYTES[dtype]
    if not 0 < nbytes <= MAX_DATA_BYTES:
        raise UsageError(
            f"chunk of shape {extent} takes {nbytes} bytes; expected 1 to {MAX_DATA_BYTES}"
        )
    return archive(emit.HEADER + tensor(dtype, extent) + emit.STOP, nbytes)


def archive(pickled: bytes, nbytes: int | None = None) -> ItemForm:
    """Return the form of what `torch.save` writes: a pickle, and its storage if it has one."""
    prefix, directory = bytearray(), bytearray()
    records = {
        "archive/data.pkl": pickled,
        "archive/byteorder": b"little",
        "archive/version": b"3\n",
    }
    for name, content in records.items():
        _append(prefix, directory, name, len(content), zlib.crc32(content))
        prefix += content
    if nbytes is not None:
        _append(prefix, directory, "archive/data/0", nbytes, 0)
    count, start = len(records) + (nbytes is not None), len(prefix) + (nbytes or 0)
    end = zips.END.pack(zips.END_MAGIC, 0, 0, count, count, len(directory), start, 0)
    return ItemForm(bytes(prefix), nbytes or 0, bytes(directory + end))


def tensor(dtype: str, shape: tuple[int, ...]) -> bytes:
    """Return the opcodes that rebuild a row-major tensor, which is all of the storage "0"."""
    storage = emit.sequence(
        emit.string("storage"),
        emit.named(_STORAGES[dtype]),
        emit.string("0"),
        emit.string("cpu"),
        emit.integer(math.prod(shape)),
    )
    strides = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    return emit.call(
        emit.named("torch._utils._rebuild_tensor_v2"),
        storage + emit.PERSISTENT,
        emit.integer(0),
        emit.integers(shape),
        emit.integers(strides),
        emit.FALSE,
        emit.call(emit.named("collections.OrderedDict")),
    )


def _append(prefix: bytearray, directory: bytearray, name: str, size: int, crc: int) -> None:
    """Append a record's local header, padded so that its bytes follow aligned, and its entry."""
    header, raw_name = len(prefix), name.encode()
    common = (10, 0, 0, 0, _DATE_1980, crc, size, size, len(raw_name))
    unpadded = header + zips.LOCAL.size + len(raw_name) + 4
    padding = -unpadded % RECORD_ALIGNMENT
    prefix += zips.LOCAL.pack(zips.LOCAL_MAGIC, *common, padding + 4)
    prefix += raw_name + struct.pack("<2sH", _PADDING_TAG, padding) + b"Z" * padding
    directory += zips.ENTRY.pack(zips.ENTRY_MAGIC, 10, *common, 0, 0, 0, 0, 0, header) + raw_name

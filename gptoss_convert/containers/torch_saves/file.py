"""One file of `torch.save`: its value, with neutral stand-ins, and where its storages lie.

Nothing of the pickle is executed. Storages lie uncompressed in the archive, so that tensors are
read in place. Format: torch/serialization.py, `_save` and `_legacy_save`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.containers.refs import Identity
from gptoss_convert.containers.torch_dist import pickles
from gptoss_convert.containers.torch_dist.files import OpenFile, open_file
from gptoss_convert.containers.torch_dist.items import (
    is_row_major,
    pickled_record,
    small_record,
    strip_root,
)
from gptoss_convert.containers.torch_dist.pickle_state import MAX_BYTES
from gptoss_convert.containers.torch_dist.stand_ins import COMMON, DTYPE_NAMES
from gptoss_convert.containers.torch_dist.zips import Member, read_archive
from gptoss_convert.containers.torch_saves.tensors import Piece
from gptoss_convert.errors import InputError, IntegrityError

MAX_DIRECTORY_BYTES = 1 << 26
"""Of the archive: one record per tensor, some 80 bytes each; all experts of 120b take 2 MB."""
_MOST_TOGETHER = 4 * MAX_BYTES
"""Of the pickles of all ranks; those of 512 ranks of 120b take about 150 MB."""
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The pickled magic number that `torch.save` began with before torch 1.6."""
_TAR = 257, b"ustar"
"""Where tar archives, older still, say what they are."""


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file of `torch.save`, read and checked but for the bytes of its storages."""

    root: Path
    name: str
    value: object
    """What was saved; what is no plain data is an inert `Record`."""
    members: Mapping[str, Member]
    identity: Identity
    """What the file was when this was read from it."""
    nbytes: int
    """Of its pickle."""

    @property
    def where(self) -> str:
        """The file, in words."""
        return str(self.root / self.name)

    def chunk(self, tensor: str, piece: Piece) -> Chunk:
        """The part of a tensor that this file holds, under a name.

        Raises IntegrityError where its storage is missing or too short, InputError for a dtype that
        no weight has, and for strides that are not row-major.
        """
        place = f"{self.where}: {tensor}"
        record = piece.record
        if record.dtype not in DTYPE_NAMES:
            raise InputError(f"{place}: dtype {record.dtype}; expects {', '.join(DTYPE_NAMES)}")
        if record.shape != piece.extent:
            raise IntegrityError(
                f"{place}: this rank's part has shape {piece.extent} of {piece.shape}, its data "
                f"{record.shape}"
            )
        if not is_row_major(record.shape, record.stride):
            raise InputError(
                f"{place}: strides {record.stride} of shape {record.shape} are not row-major; save "
                "it contiguous"
            )
        dtype = DTYPE_NAMES[record.dtype]
        nbytes = DTYPE_BYTES[dtype]
        data = self.members.get(f"data/{record.key}")
        needed = (record.offset + math.prod(record.shape)) * nbytes
        if data is None or data.size != record.numel * nbytes or needed > data.size:
            size = "no" if data is None else data.size
            raise IntegrityError(f"{place}: {record.numel} elements of {dtype} in {size} bytes")
        offset = data.offset + record.offset * nbytes
        if offset % nbytes:
            raise InputError(f"{place}: begins at byte {offset}, no multiple of {nbytes}")
        box = piece.shape, piece.start, piece.extent
        return Chunk(tensor, dtype, *box, self.name, offset, self.identity)


def open_saved(root: Path, name: str) -> SavedFile:
    """Read a file of `torch.save` up to its storages.

    Raises InputError for the older forms and compressed archives, by name; IntegrityError where the
    archive is truncated or contradicts itself.
    """
    where = str(root / name)
    with open_file(root, name) as opened:
        _require_archive(opened, where)
        archive = read_archive(opened.read_at, opened.size, where, MAX_DIRECTORY_BYTES)
        members = strip_root(archive.members, where)
        order = small_record(members, "byteorder", opened.read_at, where)
        if order not in (None, b"little"):
            raise InputError(f"{where}: byte order {order!r}; only little-endian tensors are read")
        pickled = pickled_record(members, opened.read_at, MAX_BYTES, where)
    value = pickles.load(pickled, COMMON, where, open=True)
    return SavedFile(root, name, value, members, opened.identity, len(pickled))


def open_all(root: Path, names: Iterable[str]) -> Iterator[SavedFile]:
    """The files of one model, one after the other; raises as `open_saved` does.

    Also InputError beyond what all of them together may cost: many names may stand for one file.
    """
    left = _MOST_TOGETHER
    for name in names:
        file = open_saved(root, name)
        left -= file.nbytes
        if left < 0:
            raise InputError(f"{file.where}: pickles of more than {_MOST_TOGETHER} bytes in all")
        yield file


def _require_archive(opened: OpenFile, where: str) -> None:
    """Refuse by name what `torch.load` reads too and is no archive of uncompressed records."""
    at, ustar = _TAR
    head = opened.read_at(0, min(opened.size, at + len(ustar)))
    old = head.startswith(_LEGACY) or head[at:] == ustar
    if old or head[:1] == b"\x80":
        form = "the form of torch.save before torch 1.6" if old else "a bare pickle"
        raise InputError(
            f"{where}: {form}, whose tensors cannot be found without running it; if you trust it, "
            "save it anew: torch.save(torch.load(path, weights_only=True), path)"
        )

"""Where the records of a `torch.save` file lie: a strict reader of uncompressed zip archives."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gptoss_convert.containers.disguise import LOOKED_AT, disguise
from gptoss_convert.errors import InputError, IntegrityError

ReadAt = Callable[[int, int], bytes]
"""(offset, size) -> exactly that many bytes."""

END = struct.Struct("<4s4H2IH")
END64_LOCATOR = struct.Struct("<4sIQI")
END64 = struct.Struct("<4sQ2H2I4Q")
ENTRY = struct.Struct("<4s6H3I5H2I")
LOCAL = struct.Struct("<4s5H3I2H")
END_MAGIC, END64_MAGIC, LOCATOR_MAGIC = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
ENTRY_MAGIC, LOCAL_MAGIC = b"PK\x01\x02", b"PK\x03\x04"

MAX_DIRECTORY_BYTES = 1 << 20
_ENCRYPTED, _SIZES_FOLLOW = 1 << 0, 1 << 3
_TAIL_BYTES = END.size + END64_LOCATOR.size + END64.size


@dataclass(frozen=True, slots=True)
class Member:
    """A record: `offset` of its first byte counts from the start of the archive."""

    name: str
    header: int
    offset: int
    size: int
    crc: int


@dataclass(frozen=True, slots=True)
class Archive:
    """The records of an archive by name, and where its central directory begins."""

    members: Mapping[str, Member]
    directory: int
    crc_fields: tuple[int, ...]
    """Offsets of the CRC of each record in the central directory."""


def read_archive(
    read_at: ReadAt, length: int, where: str, most: int = MAX_DIRECTORY_BYTES
) -> Archive:
    """Return the records of the archive that fills `length` bytes; their directory takes at `most`
    so many.

    Raises IntegrityError where sizes, magics or ranges contradict each other; InputError for
    compressed or encrypted records and for names that leave the archive.
    """
    try:
        return _read(read_at, length, most)
    except (InputError, IntegrityError) as error:
        raise type(error)(f"{where}: {error}") from None
    except (struct.error, IndexError):
        raise IntegrityError(f"{where}: zip archive truncated") from None


def _read(read_at: ReadAt, length: int, most: int) -> Archive:
    start, size, count, end = _find_directory(read_at, length)
    if start + size != end or size > most or count > size // ENTRY.size:
        raise IntegrityError(
            f"zip directory of {size} bytes at {start} does not reach its end record at {end}"
        )
    directory = read_at(start, size)
    members: dict[str, Member] = {}
    crc_fields: list[int] = []
    position = 0
    for _ in range(count):
        member, following = _entry(read_at, directory, position, start)
        if member.name in members:
            raise IntegrityError(f"zip record {member.name} occurs twice")
        members[member.name] = member
        crc_fields.append(start + position + 16)
        position = following
    if position != size:
        raise IntegrityError(f"zip directory holds {size - position} bytes after its last record")
    _require_disjoint(sorted(members.values(), key=lambda m: m.header), start)
    return Archive(members, start, tuple(crc_fields))


def _find_directory(read_at: ReadAt, length: int) -> tuple[int, int, int, int]:
    """Return (start, size, number of records, end) of the central directory."""
    tail_start = max(0, length - _TAIL_BYTES)
    tail = read_at(tail_start, length - tail_start)
    end = len(tail) - END.size
    if end < 0 or tail[end : end + 4] != END_MAGIC:
        head = read_at(0, min(length, LOOKED_AT))
        # What torch.save writes is an archive itself, of which the end may be missing.
        found = None if head.startswith(b"PK") else disguise(head, length, "a torch.save file")
        raise IntegrityError(found or "no zip end record: not a torch.save file, or truncated")
    _, disk, first_disk, here, count, size, start, comment = END.unpack_from(tail, end)
    if disk or first_disk or here != count or comment:
        raise IntegrityError("zip end record describes several disks or a comment")
    locator = end - END64_LOCATOR.size
    if locator < 0 or tail[locator : locator + 4] != LOCATOR_MAGIC:
        return start, size, count, tail_start + end
    end64 = END64_LOCATOR.unpack_from(tail, locator)[2]
    if end64 != tail_start + locator - END64.size:
        raise IntegrityError("zip64 end record is not where its locator says")
    magic, _, _, _, _, _, here, count, size, start = END64.unpack_from(tail, end64 - tail_start)
    if magic != END64_MAGIC or here != count:
        raise IntegrityError("zip64 end record is malformed")
    return start, size, count, end64


def _entry(read_at: ReadAt, directory: bytes, position: int, limit: int) -> tuple[Member, int]:
    """Return one record and the position of the next directory entry."""
    fields = ENTRY.unpack_from(directory, position)
    magic, flags, method = fields[0], fields[3], fields[4]
    crc, packed, size = fields[7:10]
    name_size, extra_size, comment_size, header = fields[10], fields[11], fields[12], fields[16]
    if magic != ENTRY_MAGIC:
        raise IntegrityError("zip directory entry is malformed")
    name_end = position + ENTRY.size + name_size
    raw_name = directory[position + ENTRY.size : name_end]
    name = _safe_name(raw_name)
    if method != 0 or flags & _ENCRYPTED:
        raise InputError(f"zip record {name} is compressed or encrypted; expected stored")
    extra = directory[name_end : name_end + extra_size]
    size, packed, header = _widen(extra, (size, packed, header))
    if size != packed:
        raise IntegrityError(f"zip record {name}: stored in {packed} bytes, expands to {size}")
    offset = _data_offset(read_at, header, raw_name, size, limit)
    return Member(name, header, offset, size, crc), name_end + extra_size + comment_size


def _widen(extra: bytes, values: tuple[int, int, int]) -> tuple[int, int, int]:
    """Replace each 32-bit value that is all ones by the next one of the zip64 extra field."""
    wide: list[int] = []
    position = 0
    while position + 4 <= len(extra):
        tag, size = struct.unpack_from("<2H", extra, position)
        if tag == 1 and position + 4 + size <= len(extra):
            wide = list(struct.unpack_from(f"<{size // 8}Q", extra, position + 4))
        position += 4 + size
    first, second, third = (wide.pop(0) if v == 0xFFFFFFFF else v for v in values)
    return first, second, third


def _data_offset(read_at: ReadAt, header: int, raw_name: bytes, size: int, limit: int) -> int:
    """Return where a record's bytes begin, after checking its local header."""
    if header + LOCAL.size > limit:
        raise IntegrityError(f"zip record header at {header} lies beyond its directory")
    fields = LOCAL.unpack(read_at(header, LOCAL.size))
    magic, flags, method, local_size, name_size, extra_size = (
        fields[i] for i in (0, 2, 3, 8, 9, 10)
    )
    offset = header + LOCAL.size + name_size + extra_size
    if magic != LOCAL_MAGIC or method != 0 or offset + size > limit:
        raise IntegrityError(f"zip record at {header} is malformed or reaches into its directory")
    if read_at(header + LOCAL.size, name_size) != raw_name:
        raise IntegrityError(f"zip record at {header} has two names")
    if not flags & _SIZES_FOLLOW and local_size not in (size, 0xFFFFFFFF):
        raise IntegrityError(f"zip record at {header} has two sizes: {local_size} and {size}")
    return offset


def _safe_name(raw_name: bytes) -> str:
    try:
        name = raw_name.decode("ascii")
    except UnicodeDecodeError:
        raise InputError("zip record name is not ASCII") from None
    parts = name.split("/")
    if not name.isprintable() or "\\" in name or ":" in name or {"", ".", ".."} & set(parts):
        raise InputError(f"zip record name {name!a} leaves its archive; not read")
    return name


def _require_disjoint(members: list[Member], limit: int) -> None:
    starts = [*(member.header for member in members), limit]
    for member, bound in zip(members, starts[1:], strict=True):
        if member.offset + member.size > bound:
            raise IntegrityError(f"zip record {member.name} overlaps what follows it")

"""The safetensors container: headers and indexes are read and checked.

Why the header is read and written here and not by the reference library:
docs/decisions/0002-own-safetensors-headers.md.
Format: https://github.com/huggingface/safetensors#format.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.containers.budget import HEADER
from gptoss_convert.containers.disguise import LOOKED_AT, disguise
from gptoss_convert.containers.paths import lies, open_inside, read_text, safe_name
from gptoss_convert.containers.refs import Identity
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
"""The weights of a model in one file: where it is, transformers looks at no index."""
SHARDING = "DCP_SHARDING_INFO"
"""Key of a header whose tensors are boxes of larger ones; a rank may have an empty one."""
MAX_HEADER = HEADER.nbytes
MAX_TENSORS = 200_000
MAX_NAME = 512
_OTHER_DTYPES = frozenset(
    ("BOOL", "I8", "I16", "U16", "I32", "U32", "I64", "U64", "F64", "F8_E5M2")
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


Left = Callable[[str], bool]
"""Whether a tensor of a name is left out, whatever it is."""


@dataclass(frozen=True)
class Header:
    """A checked safetensors header."""

    text: str
    """The JSON as stored, padding included."""
    chunks: tuple[Chunk, ...]
    metadata: Mapping[str, str]

    @property
    def data_start(self) -> int:
        """Byte offset of the first tensor byte."""
        return 8 + len(self.text.encode())


def read_directory(
    root: Path, left: Left = lambda name: False
) -> tuple[tuple[Chunk, ...], dict[str, Header]]:
    """All tensors of the shards in `root`, and each file's header.

    What is `left` out later may be of any dtype, and is bytes here.
    With an index, exactly the files it names are read and both must agree; without one,
    `model.safetensors` as transformers does, else every `*.safetensors` file.
    Raises InputError or IntegrityError naming file and tensor.
    """
    index = _read_index(root)
    single = lies(root, SINGLE)
    if index is not None and single and {*index.values()} != {SINGLE}:
        raise IntegrityError(
            f"{root}: holds two models: {SINGLE}, which transformers loads, and the shards of "
            f"{INDEX}; move one of them away"
        )
    if index is None:
        names = [SINGLE] if single else sorted(path.name for path in root.glob("*.safetensors"))
    else:
        names = sorted(set(index.values()))
        if lost := [name for name in names if not (root / name).exists()]:
            raise IntegrityError(
                f"{root / INDEX}: {len(lost)} of {len(names)} shards missing: {', '.join(lost)}"
            )
    headers: dict[str, Header] = {}
    home: dict[str, str] = {}
    room = MAX_HEADER
    for name in names:
        # As it comes, not at the end: many names may stand for one large header.
        header = headers[name] = read_header(root, name, room, left=left)
        room -= len(header.text)
        for chunk in header.chunks:
            if chunk.tensor in home:
                other = home[chunk.tensor]
                raise IntegrityError(f"{chunk.tensor}: stored in {other} and again in {name}")
            home[chunk.tensor] = name
        if len(home) > MAX_TENSORS:
            raise InputError(f"{root}: {len(home)} tensors and more, at most {MAX_TENSORS}")
    if index is not None:
        _check_index(root, index, home)
    return tuple(chunk for header in headers.values() for chunk in header.chunks), headers


def spare(root: Path, chunks: Iterable[Chunk]) -> list[str]:
    """The `*.safetensors` files that none of these tensors lies in."""
    return sorted({path.name for path in root.glob("*.safetensors")} - {c.file for c in chunks})


def remarks(root: Path, chunks: Iterable[Chunk]) -> list[str]:
    """What is odd about a directory and harms nothing: spare shards, a wrong total."""
    chunks = list(chunks)
    text = index_text(root)
    namer = f"{root}: beside {SINGLE}" if text is None else f"{root / INDEX}: does not name"
    others = spare(root, chunks)
    notes = [f"{namer} {', '.join(others)}: not read"] if others else []
    if text is None:
        return notes
    stated = parse_object(str(root / INDEX), text, HEADER).get("metadata")
    total = stated.get("total_size") if isinstance(stated, dict) else None
    found = sum(chunk.nbytes for chunk in chunks)
    if total is not None and total != found:
        notes.append(f"{root / INDEX}: total_size is {total!r:.40}, the tensors take {found} bytes")
    return notes


def read_header(
    root: Path,
    name: str,
    most: int = MAX_HEADER,
    tensors: int = MAX_TENSORS,
    left: Left = lambda name: False,
) -> Header:
    """The header of one file, fully checked against its size; nothing past the header is read.

    Raises IntegrityError for more than `most` bytes, InputError for more than so many tensors,
    before they are looked at.
    """
    where = root / name
    with open_inside(root, name) as file:
        size = file.seek(0, 2)
        file.seek(0)
        head = file.read(8)
        if len(head) < 8 or (length := struct.unpack("<Q", head)[0]) > size - 8:
            found = disguise(head + file.read(LOOKED_AT), size, "safetensors")
            unknown = f"no safetensors header in {size} bytes: truncated, or another format"
            raise IntegrityError(f"{where}: {found or unknown}")
        if length > most:
            others = " beside those of the other shards" if most < MAX_HEADER else ""
            raise IntegrityError(f"{where}: header of {length} bytes, at most {most}{others}")
        raw = file.read(length)
        identity = Identity.of(file.fileno())
    # Every tensor has this key, and names that hold it only count too often.
    if (count := raw.count(b'"data_offsets"')) > tensors:
        raise InputError(f"{where}: {count} tensors, at most {tensors}")
    return parse_header(where, name, raw, size - 8 - length, identity, left)


def parse_header(
    where: Path | str,
    name: str,
    raw: bytes,
    data_bytes: int | None,
    identity: Identity | None = None,
    left: Left = lambda name: False,
) -> Header:
    """Check a header against the number of data bytes behind it, unless that is still to be
    written; offsets become absolute.
    """
    if not raw.startswith(b"{"):
        raise IntegrityError(f"{where}: header does not start with '{{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{where}: header is not UTF-8 at byte {error.start}") from None
    content = parse_object(f"{where}: header", text, HEADER)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(not isinstance(v, str) for v in metadata.values()):
        raise IntegrityError(f"{where}: __metadata__ is not a map of strings")
    if len(content) > MAX_TENSORS:
        raise InputError(f"{where}: {len(content)} tensors, at most {MAX_TENSORS}")
    start = 8 + len(raw)
    chunks = sorted(
        (
            _entry(where, name, tensor, entry, start, identity, left(tensor))
            for tensor, entry in content.items()
        ),
        key=lambda chunk: (chunk.offset, chunk.nbytes),
    )
    end = start
    for chunk in chunks:
        if not (chunk.nbytes or SHARDING in metadata or left(chunk.tensor)):
            raise InputError(f"{where}: {chunk.tensor}: empty tensor of shape {[*chunk.shape]}")
        if chunk.offset != end:
            kind = (
                "overlaps the tensor before it" if chunk.offset < end else "leaves a hole before it"
            )
            raise IntegrityError(
                f"{where}: {chunk.tensor}: starts at byte {chunk.offset}, expected {end}: {kind}"
            )
        end += chunk.nbytes
    if data_bytes is not None and end != start + data_bytes:
        kind = "truncated" if end > start + data_bytes else "trailing bytes"
        raise IntegrityError(
            f"{where}: {kind}: the header describes {end} bytes, the file has {start + data_bytes}"
        )
    return Header(text, tuple(chunks), metadata)


def _entry(
    where: Path | str,
    file: str,
    name: str,
    entry: Any,
    start: int,
    identity: Identity | None,
    left: bool,
) -> Chunk:
    if not 0 < len(name) <= MAX_NAME or _CONTROL.search(name) or ".." in name or "/" in name:
        raise InputError(f"{where}: tensor name {name[:80]!r} is not acceptable")
    place = f"{where}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise IntegrityError(f"{place}: expects dtype, shape and data_offsets, found {entry!r:.80}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str):
        raise IntegrityError(f"{place}: dtype {dtype!r:.80} is not a string")
    if dtype not in DTYPE_BYTES and not left:
        known = dtype in _OTHER_DTYPES
        what = "has no place in GPT-OSS" if known else "is unknown"
        raise InputError(f"{place}: dtype {dtype!r} {what}; expects {', '.join(DTYPE_BYTES)}")
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2 or len(shape) > 8:
        raise IntegrityError(f"{place}: shape {shape!r:.80} or offsets {offsets!r:.80} malformed")
    if left:
        dtype, shape = "U8", [max(offsets[1] - offsets[0], 0)]
    zeros, offset = (0,) * len(shape), start + offsets[0]
    chunk = Chunk(name, dtype, tuple(shape), zeros, tuple(shape), file, offset, identity)
    if chunk.nbytes != offsets[1] - offsets[0]:
        raise IntegrityError(
            f"{place}: {dtype} {shape} takes {chunk.nbytes} bytes, offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return chunk


def _naturals(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 53 for n in numbers)


def index_text(root: Path) -> str | None:
    """The index as it stands in `root`, None without one."""
    return read_text(root, INDEX, MAX_HEADER) if lies(root, INDEX) else None


def _read_index(root: Path) -> dict[str, str] | None:
    path = root / INDEX
    text = index_text(root)
    if text is None:
        return None
    weight_map = parse_object(str(path), text, HEADER).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise IntegrityError(f"{path}: no weight_map")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not safe_name(name):
            raise InputError(f"{path}: {tensor}: file name {name!r} leaves the directory")
        if not name.endswith(".safetensors"):
            raise InputError(f"{path}: {tensor}: {name!r} is not a safetensors file")
    return weight_map


def _check_index(root: Path, index: Mapping[str, str], home: Mapping[str, str]) -> None:
    for tensor, name in index.items():
        if home.get(tensor) != name:
            found = home.get(tensor, "nowhere")
            raise IntegrityError(f"{root / INDEX}: {tensor}: expected in {name}, found {found}")
    for tensor, name in home.items():
        if tensor not in index:
            raise IntegrityError(f"{root / INDEX}: {tensor} of {name} is not in the index")

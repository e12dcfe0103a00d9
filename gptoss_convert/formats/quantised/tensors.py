"""Checkpoints that other tools quantised: each tensor seen as the BF16 values that it decodes to.

`mappings/quantised.toml` says which stored tensors make one of the model's, and which decoder reads
them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from gptoss_convert.codecs.decoders.decoder import Member, load_decoder
from gptoss_convert.containers import Chunk, Packed
from gptoss_convert.containers.paths import open_file
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.quantised.settings import METHODS, UNREAD
from gptoss_convert.layouts.model import read_toml

_STATE = "state"
"""The member that is no array: JSON, read when the checkpoint is opened."""
_MAX_STATE = 1 << 16
_CACHES = "caches"
"""The table's section of what belongs to no weight."""


@dataclass(frozen=True)
class Quantised:
    """What is left of a checkpoint's tensors once quantised ones are seen decoded."""

    chunks: tuple[Chunk, ...]
    decoded: Mapping[str, int]
    """How many tensors were, by what they were stored as."""
    caches: int
    """Scales of a cache at serving, left out."""

    @property
    def notes(self) -> list[str]:
        """One for each way of storing."""
        found = [f"{count} tensors decoded from {title}" for title, count in self.decoded.items()]
        left = [f"{self.caches} scales of a KV cache left out: they are the server's"]
        return found + left * bool(self.caches)


@dataclass(frozen=True)
class _Section:
    title: str
    method: str
    decoder: str
    value: str
    members: Mapping[str, str]
    harmless: tuple[str, ...] = ()
    numbers: Mapping[str, float] = field(default_factory=dict)

    def stems(self, names: Iterable[str]) -> Iterator[str]:
        """The stems of which all members are there."""
        known = {*names}
        needed = [name for member, name in self.members.items() if not member.endswith("?")]
        longest = max(needed, key=len).removeprefix("{stem}")
        for name in sorted(known):
            stem = name.removesuffix(longest)
            if stem != name and all(one.format(stem=stem) in known for one in needed):
                yield stem


@cache
def _sections() -> tuple[_Section, ...]:
    content = (one for name, one in read_toml("quantised.toml").items() if name != _CACHES)
    return tuple(_Section(**{**one, "harmless": (*one.get("harmless", ()),)}) for one in content)


def methods() -> frozenset[str]:
    """The values of `quant_method` that are read here."""
    return frozenset(one.method for one in _sections())


def why_not(method: str) -> str:
    """Why a checkpoint that names this method has no tensors that are decoded."""
    if method in methods():
        return "and no tensor is stored as that stores them"
    known = ", ".join(sorted({"mxfp4", *methods()}))
    return UNREAD.get(method, f"which is not known here; supported: {known}, or none")


def decoded(where: str, root: Path, chunks: Sequence[Chunk], said: object) -> Quantised:
    """The checkpoint's tensors, quantised ones decoded as quantization_config says.

    Raises InputError for what that says and is not read here, and for members that do not belong
    together.
    """
    method = said.get("quant_method") if isinstance(said, dict) else None
    if not isinstance(method, str) or method not in methods():
        return Quantised(tuple(chunks), {}, 0)
    assert isinstance(said, dict)
    numbers = METHODS[method](f"{where}: quantization_config", said)
    left = {chunk.tensor: chunk for chunk in chunks}
    made: list[Chunk] = []
    counts: dict[str, int] = {}
    for section in (one for one in _sections() if one.method == method):
        for stem in [*section.stems(left)]:
            one = _decoded(root, section, stem, left, {**numbers, **section.numbers})
            if one is not None:
                made.append(one)
                counts[section.title] = counts.get(section.title, 0) + 1
    ends = tuple(read_toml("quantised.toml")[_CACHES]["harmless"])
    kept = [chunk for name, chunk in left.items() if not name.endswith(ends)]
    return Quantised((*kept, *made), counts, len(left) - len(kept))


def _decoded(
    root: Path, section: _Section, stem: str, left: dict[str, Chunk], numbers: Mapping[str, float]
) -> Chunk | None:
    """The decoded tensor, its members taken out of what is left; None if they are of other
    dtypes."""
    named = {
        member.removesuffix("?"): name.format(stem=stem) for member, name in section.members.items()
    }
    members = {member: left[name] for member, name in named.items() if name in left}
    state = members.pop(_STATE, None)
    decoder = load_decoder(section.decoder)
    if any(chunk.dtype not in decoder.dtypes[member] for member, chunk in members.items()):
        return None
    name = section.value.format(stem=stem)
    if state is not None:
        numbers = _read_state(root, state)
    shapes = {member: Member(chunk.dtype, chunk.shape) for member, chunk in members.items()}
    try:
        shape = decoder.shape(shapes, numbers)
    except InputError as error:
        raise InputError(f"{root}: {name}: {section.title}: {error}") from None
    packed = Packed(section.decoder, (*members.items(),), (*numbers.items(),))
    for gone in (*named.values(), *(one.format(stem=stem) for one in section.harmless)):
        left.pop(gone, None)
    codes = members["codes"]
    return replace(
        codes,
        tensor=name,
        dtype="BF16",
        shape=shape,
        start=(0,) * len(shape),
        extent=shape,
        offset=0,
        packed=packed,
    )


def _read_state(root: Path, chunk: Chunk) -> dict[str, float]:
    """bitsandbytes' QuantState, as its `as_dict` writes it; each key is used or refused."""
    place = f"{root / chunk.file}: {chunk.tensor}"
    if chunk.dtype != "U8" or chunk.nbytes > _MAX_STATE:
        raise InputError(f"{place}: {chunk.nbytes} bytes of {chunk.dtype}, expects JSON")
    with open_file(FileRef(root, chunk.file, chunk.identity)) as file:
        file.seek(chunk.offset)
        raw = file.read(chunk.nbytes)
    if len(raw) < chunk.nbytes or not any(raw):
        raise InputError(f"{place}: not at hand: download the repository, and name its directory")
    try:
        said = parse_object(place, raw.decode("utf-8"))
    except UnicodeDecodeError:
        raise IntegrityError(f"{place}: not UTF-8") from None
    shape = said.get("shape")
    if not isinstance(shape, list) or any(type(n) is not int or n < 1 for n in shape):
        raise InputError(f"{place}: shape is {shape!r:.80}")
    numbers: dict[str, float] = {"dims": len(shape)}
    numbers |= {f"dim{i}": n for i, n in enumerate(shape)}
    for key, value in said.items():
        if key in _STATE_NUMBERS and type(value) in (int, float) and value == value:
            numbers[key] = value
        elif key != "shape" and value not in _STATE_VALUES.get(key, ()):
            raise InputError(f"{place}: {key} is {value!r:.80}, which is not read")
    if numbers.get("blocksize", 0) < 1 or numbers.get("nested_blocksize", 1) < 1:
        raise InputError(f"{place}: no blocksize")
    return {"nested_offset": 0.0, "nested_blocksize": 256, **numbers}


_STATE_NUMBERS = frozenset(("blocksize", "nested_blocksize", "nested_offset"))
_STATE_VALUES: Mapping[str, tuple[object, ...]] = {
    "quant_type": ("nf4", "fp4"),
    # Another dtype is rounded to by bitsandbytes, and would be rounded twice here.
    "dtype": ("bfloat16",),
    "nested_dtype": ("float32",),
}
"""What a QuantState may say besides numbers and its shape."""

"""State dicts of one rank or of all ranks: each tensor is put together from parts that tile it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.containers import Chunk
from gptoss_convert.containers.torch_dist.coverage import require_tiling
from gptoss_convert.containers.torch_dist.metadata import ChunkBox
from gptoss_convert.containers.torch_saves.file import SavedFile, open_all
from gptoss_convert.containers.torch_saves.tensors import is_tensor, pieces
from gptoss_convert.errors import InputError, IntegrityError

_MAX_DEPTH = 16
_MAX_VALUES = 1 << 20
_MAX_NAME = 512
_MAX_PARTS = 1 << 20
"""Of 512 ranks of 120b: some 400,000."""


@dataclass(frozen=True, slots=True)
class Merged:
    """The tensors of one model out of the files of all ranks."""

    chunks: tuple[Chunk, ...]
    homes: Mapping[str, tuple[str, ...]]
    """The files that hold each tensor or a part of it, of those that were skipped, too."""
    values: int
    """How many values the first file holds that are no tensors."""
    replicas: int
    """Copies of a part of a tensor beyond the first: they are not read."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, those that were skipped included."""
        return tuple(self.homes)


Skip = Callable[[str], str | None]
"""The kind of what a name stands for where that is no weight, else None."""


def read(root: Path, names: Sequence[str], skip: Skip = lambda name: None) -> Merged:
    """The tensors of these files, which are one model's; see `merged`."""
    return merged(str(root), open_all(root, names), skip)


def merged(where: str, files: Iterable[SavedFile], skip: Skip = lambda name: None) -> Merged:
    """The tensors that the files hold together; one file is in memory at a time.

    Raises IntegrityError where the ranks contradict each other, or leave a gap.
    """
    parts: dict[str, list[Chunk]] = defaultdict(list)
    homes: dict[str, list[str]] = defaultdict(list)
    values: list[int] = []
    count = 0
    for file in files:
        values.append(0)
        for name, value in named_values(file.value, file.where):
            if not is_tensor(value):
                values[-1] += 1
                continue
            homes[name].append(file.name)
            if skip(name) is not None:
                continue
            for piece in pieces(value, f"{file.where}: {name}"):
                parts[name].append(file.chunk(name, piece))
                require_few(where, count := count + 1)
    chunks: list[Chunk] = []
    replicas = 0
    for name, held in parts.items():
        kept = tiled(f"{where}: {name}", held)
        replicas += sum(1 for chunk in held if math.prod(chunk.extent)) - len(kept)
        chunks += kept
    lying = {name: tuple(files) for name, files in homes.items()}
    return Merged(tuple(chunks), lying, values[0] if values else 0, replicas)


def require_few(where: str, parts: int) -> None:
    """Raise InputError for more parts of tensors, in all files, than any run saves."""
    if parts > _MAX_PARTS:
        raise InputError(f"{where}: more than {_MAX_PARTS} parts of tensors")


def named_values(value: object, where: str, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Every value of nested dicts under the keys that lead to it, joined by dots.

    Raises InputError for what is no dict, and beyond what genuine files nest and hold.
    """
    if not isinstance(value, dict):
        kind = getattr(value, "name", type(value).__name__)
        raise InputError(f"{where}: holds {kind}, expects a state dict: names and tensors")
    for count, pair in enumerate(_walk(value, prefix, 0, where)):
        if count >= _MAX_VALUES:
            raise InputError(f"{where}: more than {_MAX_VALUES} values")
        yield pair


def _walk(
    value: Mapping[object, object], prefix: str, depth: int, where: str
) -> Iterator[tuple[str, object]]:
    if depth > _MAX_DEPTH:
        raise InputError(f"{where}: dicts nest deeper than {_MAX_DEPTH} levels")
    for key, one in value.items():
        name = f"{prefix}{key}" if isinstance(key, str | int) else ""
        if not name.isprintable() or not 0 < len(name) <= _MAX_NAME:
            raise InputError(
                f"{where}: a key is no printable string of 1 to {_MAX_NAME} characters"
            )
        if isinstance(one, dict):
            yield from _walk(one, f"{name}.", depth + 1, where)
        else:
            yield name, one


def tiled(where: str, held: Sequence[Chunk]) -> list[Chunk]:
    """One chunk for each part of a tensor that any rank holds; parts without elements go.

    Raises IntegrityError where they contradict each other, overlap, or leave a gap.
    """
    first = held[0]
    for chunk in held:
        if (chunk.dtype, chunk.shape) != (first.dtype, first.shape):
            raise IntegrityError(
                f"{where}: {first.dtype} {first.shape} in {first.file}, {chunk.dtype} "
                f"{chunk.shape} in {chunk.file}"
            )
    kept = {
        ChunkBox(chunk.start, chunk.extent): chunk
        for chunk in reversed(held)
        if math.prod(chunk.extent)
    }
    if not kept:
        raise InputError(f"{where}: empty tensor of shape {first.shape}")
    try:
        require_tiling(first.shape, kept.keys())
    except (InputError, IntegrityError) as error:
        raise type(error)(f"{where}: {error}") from None
    return [*kept.values()]

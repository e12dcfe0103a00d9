"""A repository as a directory of sparse files, of which only the headers are fetched, by ranges.

The headers are parsed by the same code, with the same checks, as those of a directory on disk.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from gptoss_convert.containers import safetensors
from gptoss_convert.containers.budget import HEADER
from gptoss_convert.containers.paths import safe_name, settled
from gptoss_convert.containers.seen import forgetting
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import GptossError, InputError, NetworkError, UsageError
from gptoss_convert.formats import sidecar
from gptoss_convert.formats.checkpoint import CONFIG, MANIFEST, Checkpoint, Choices
from gptoss_convert.formats.registry import FORMATS, formats_in, open_checkpoint
from gptoss_convert.hub.client import beginning
from gptoss_convert.hub.listing import Listing

_FIRST = 1 << 16
"""Bytes of a shard asked for at once: the headers of the released models fit."""
_AT_ONCE = 8
_WHOLE = frozenset((CONFIG, MANIFEST, safetensors.INDEX, "dtypes.json", sidecar.ORIGIN))
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".distcp")


def files_of(listing: Listing, format: str | None) -> tuple[str, ...]:
    """The files of one checkpoint format, of the first that the repository holds if not said.

    Raises UsageError for a format whose headers lie between its data, InputError for a path that
    leads out of the repository.
    """
    names = listing.files.keys()
    try:
        held = [kind.listed(names) for kind in FORMATS.values() if format in {None, kind.name}]
    except UsageError as error:
        raise UsageError(
            f"{listing.repository}: {error}; run: hf download {listing.repository} --local-dir DIR"
        ) from None
    chosen = next(filter(None, held), {name for name in names if "/" not in name})
    for name in sorted(chosen):
        if not safe_name(name, folders=True):
            raise InputError(f"{listing.repository}: file name {name!r:.80} is not acceptable")
    return tuple(sorted(chosen))


def is_weights(name: str) -> bool:
    """Whether a file holds weights, of this format or another."""
    return name.endswith(_WEIGHTS)


@contextmanager
def outline(listing: Listing, format: str | None) -> Iterator[Path]:
    """A temporary directory with a file for each of the format's, of its true size.

    Headers and configuration are real, all else is a hole. Errors that are raised inside name the
    repository.
    """
    chosen = files_of(listing, format)
    with TemporaryDirectory(prefix="gptoss-convert-") as place:
        root = settled(Path(place)).joinpath(*listing.repository.name.split("/"))
        with _named(f"{settled(Path(place))}/"):
            root.mkdir(parents=True)
            _fill(listing, root, [name for name in chosen if not is_weights(name)], frozenset())
            read = _indexed(listing, root, chosen)
            _fill(listing, root, [name for name in chosen if is_weights(name)], read)
            yield root


def opened(listing: Listing, root: Path, choices: Choices) -> Checkpoint:
    """The checkpoint in an outline or snapshot of a repository, named after it."""
    root = settled(root)
    if root.is_dir():
        _require_read_from_afar(listing, root, choices.format)
    with forgetting():
        found = open_checkpoint(root, choices)
    short = f"{root}".removesuffix(str(listing.repository))
    notes = tuple(note.replace(short, "") for note in found.notes)
    return replace(found, repository=listing.repository, outline=root, notes=notes)


def _require_read_from_afar(listing: Listing, root: Path, format: str | None) -> None:
    """Raise UsageError for a form whose tensors lie inside its files, which are holes here."""
    held = formats_in(root)
    for name in held if format is None else [format]:
        if not FORMATS[name].written:
            raise UsageError(
                f"{listing.repository}: {name} is read from a directory only; run: hf download "
                f"{listing.repository} --local-dir DIR"
            )


def _fill(listing: Listing, root: Path, names: Iterable[str], real: Set[str]) -> None:
    """Write files of their true size; what is not `real` is a hole, but for configuration."""

    def write(name: str) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(_content(listing, name, name in real))
            file.truncate(listing.files[name])

    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(write, names))


def _content(listing: Listing, name: str, real: bool) -> bytes:
    """What an outline holds of a file: a shard's header, a small file, or nothing."""
    size = min(listing.files[name], 8 + safetensors.MAX_HEADER)
    if real and is_weights(name):
        head = beginning(listing, name, min(size, _FIRST))
        length = struct.unpack("<Q", head[:8])[0] if len(head) >= 8 else 0
        return beginning(listing, name, 8 + length) if len(head) < 8 + length <= size else head
    if real or name.rpartition("/")[2] in _WHOLE:
        return beginning(listing, name, size)
    return b""


def _indexed(listing: Listing, root: Path, chosen: Sequence[str]) -> frozenset[str]:
    """The files whose headers will be read: the scales, and the shards of the index, else all.

    Shards that the cache lacks raise NetworkError where nothing may be downloaded.
    """
    shards = [name for name in chosen if name.endswith(".safetensors")]
    index = next((name for name in chosen if name.endswith(safetensors.INDEX)), None)
    if index is None:
        return frozenset(shards)
    content = parse_object(
        index, (root / index).read_text(encoding="utf-8", errors="replace"), HEADER
    )
    stated = content.get("weight_map")
    folder = index.removesuffix(safetensors.INDEX)
    named = {f"{folder}{name}" for name in stated.values()} if isinstance(stated, dict) else set()
    missing = sorted(named - listing.files.keys())
    if missing and listing.cached_only:
        raise NetworkError(
            f"{listing.repository}: the cache lacks {', '.join(missing)}, and HF_HUB_OFFLINE is set"
        )
    return frozenset(n for n in shards if n in named or n.startswith(f"{sidecar.FOLDER}/"))


@contextmanager
def _named(place: str) -> Iterator[None]:
    """Messages speak of the repository, not of the temporary directory that stands for it."""
    try:
        yield
    except GptossError as error:
        error.args = (str(error).replace(place, ""),)
        raise

"""What TARGET gets beside converted tensors: the tokenizer and its like, the scales' sidecar."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath

from gptoss_convert.containers import Image
from gptoss_convert.containers.disguise import disguise
from gptoss_convert.containers.paths import (
    Followed,
    folder_inside,
    lies,
    open_inside,
    safe_name,
    settled,
)
from gptoss_convert.containers.refs import Copied, FileRef, Identity
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats import sidecar
from gptoss_convert.formats.checkpoint import CONFIG, MANIFEST, Checkpoint
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.layouts.model import load_model

_SERVED = frozenset(
    (
        *(
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "added_tokens.json",
        ),
        *("vocab.json", "merges.txt", "tokenizer.model", "generation_config.json"),
        *("chat_template.jinja", "chat_template.json"),
    )
)
"""What servers read beside config.json and the weights, by name."""
_SAID = ("LICENSE", "LICENCE", "NOTICE", "USAGE_POLICY", "README", "COPYING", "CITATION")
"""Beginnings of the names of files that say who made the model, and under which terms."""
_PAGES = frozenset(("", ".md", ".txt", ".cff"))
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_ERROR = frozenset(("error", "message", "code", "status", "detail", "type"))
"""The keys of an error's answer in JSON."""
_OURS = frozenset((CONFIG, MANIFEST, "dtypes.json", "original", "metal", sidecar.FOLDER))
"""Neither weights nor carried, and not worth a note."""
_MOST = 256 << 20
"""Most bytes of one carried file, and of all of them together."""
_PARSED = 1 << 20
"""JSON up to this size is parsed; of a larger one, a tokenizer of 28 MB say, both ends are seen."""
_END = 4096
_SHOWN = 8
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def _is_served(name: str) -> bool:
    said = name.upper().startswith(_SAID) and PurePath(name).suffix.lower() in _PAGES
    return name in _SERVED or name.endswith(".tiktoken") or said


def carried_files(root: Path) -> tuple[Path, ...]:
    """The files beside the weights that a served directory needs and no conversion changes."""
    served = (path for path in _beside(root) if _is_served(path.name))
    return tuple(path for path in served if lies(root, path.name) and path.is_file())


def _beside(root: Path) -> list[Path]:
    """What lies in a directory and is not hidden, by name."""
    found = sorted(root.iterdir()) if root.is_dir() else []
    return [path for path in found if not path.name.startswith(".")]


def copies(source: Checkpoint, options: ImageOptions) -> tuple[list[tuple[str, Copied]], list[str]]:
    """The carried files of SOURCE or of --tokenizer, and notes on what is missing or left behind.

    Raises IntegrityError for a file that is not what its name says, such as a Git LFS pointer.
    """
    folder = options.tokenizer
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tokenizer {folder}: no such directory")
    if folder is not None:
        folder = Followed(folder) if isinstance(source.root, Followed) else settled(folder)
    paths = carried_files(folder) if folder is not None else source.carried
    # Of a repository only names and sizes are known so far; the Hub sends files, never pointers.
    known = folder is not None or source.outline is None
    try:
        found = [(path.name, _checked(path) if known else _promised(path)) for path in paths]
    except IntegrityError as error:
        raise IntegrityError(
            f"{error}; or pass --tokenizer DIR to take such files from there"
        ) from None
    if (nbytes := sum(copied.size for _, copied in found)) > _MOST:
        raise InputError(
            f"{paths[0].parent}: {nbytes} bytes of files beside the weights, at most {_MOST} "
            "are carried; move away what the model does not need"
        )
    notes: list[str] = []
    if lacking := [name for name in _TOKENIZER if name not in {path.name for path in paths}]:
        missing = " and no ".join(lacking)
        advice = f"--tokenizer {options.tokenizer} has none"
        if folder is None:
            advice = "SOURCE has none; pass --tokenizer DIR to add them"
        notes.append(f"no {missing}: {advice}")
    return found, notes + _left(source)


def _left(source: Checkpoint) -> list[str]:
    """A note on what lies beside SOURCE's weights and no server reads, if anything."""
    if source.kind.side is None:
        return []
    folder = folder_inside(source.base, source.kind.side)
    names = [
        path.name + "/" * path.is_dir()
        for path in (_beside(folder) if folder else ())
        if not (_is_served(path.name) or path.name in _OURS or path.name.endswith(_WEIGHTS))
    ]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    shown = ", ".join(names[:_SHOWN]) + more
    return [f"left behind, as no server reads it: {shown}"] * bool(names)


def problems(paths: Iterable[Path]) -> Iterator[str]:
    """What is wrong with carried files, file by file."""
    for path in paths:
        try:
            _checked(path)
        except (InputError, IntegrityError) as error:
            yield str(error)


def _promised(path: Path) -> Copied:
    """A file that is still to be downloaded."""
    return Copied(FileRef(path.parent, path.name), path.stat().st_size)


def _checked(path: Path) -> Copied:
    """A file by what it is now; refuses one that is not of the kind its name says."""
    with open_inside(path.parent, path.name) as stream:
        identity = Identity.of(stream.fileno())
        file, size = FileRef(path.parent, path.name, identity), identity.size
        start = stream.read(_PARSED if size <= _PARSED else _END)
        stream.seek(max(size - _END, 0))
        end = stream.read(_END)
    problem = _wrong(file.name, start, end, size)
    if problem:
        raise IntegrityError(f"{file}: {problem}")
    if not safe_name(file.name):
        raise InputError(f"{file}: no name for a file on every system; rename it or move it away")
    return Copied(file, size)


def _wrong(name: str, start: bytes, end: bytes, size: int) -> str | None:
    """What is wrong with a file of this name and these ends, None if nothing is."""
    if (size or name in _SERVED) and (found := disguise(start, size)):
        return found
    if name.endswith(".json"):
        return _not_json(start, end, size)
    if name.endswith(".jinja") and _is_error(start):
        return "an error's answer; download it again"
    return "not text" if b"\0" in start and not name.endswith(".model") else None


def _not_json(start: bytes, end: bytes, size: int) -> str | None:
    """Why these are not the ends of a JSON object, None if they may be."""
    if not start.lstrip().startswith(b"{") or not end.rstrip().endswith(b"}"):
        return f"no JSON object in {size} bytes: truncated, or another kind of file"
    if size <= _PARSED:
        try:
            json.loads(start)
        except (ValueError, RecursionError) as error:
            return f"not JSON: {error}"
        if _is_error(start):
            return "an error's answer; download it again"
    return None


def _is_error(content: bytes) -> bool:
    """Whether this is the JSON object with which a server answers what it cannot serve."""
    try:
        keys = set(json.loads(content))
    except (TypeError, ValueError, RecursionError):
        return False
    return "error" in keys and keys <= _ERROR


def sidecar_image(source: Checkpoint, variant: str, options: ImageOptions) -> Image:
    """The sidecar, wherever BF16 is written and the scales of its MXFP4 source are known."""
    known = source.encoding == "mxfp4" or source.scales is not None
    if variant == "mxfp4" or not known or not options.keep_scales:
        return Image((), (), ())
    sizes = load_model().sizes(source.config.numbers)
    return sidecar.image(sizes, source.origin())

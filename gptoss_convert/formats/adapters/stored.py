"""An adapter's files: where they lie, their tensors by name, and what wrote them. No pickle is read
that could run anything, and none at all beside safetensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk, budget, safetensors
from gptoss_convert.containers.iterations import find_iteration
from gptoss_convert.containers.paths import lies, open_inside, read_text, settled
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import GptossError, InputError, IntegrityError, UsageError
from gptoss_convert.formats.adapters.settings import CONFIG

WEIGHTS = "adapter_model.safetensors"
PICKLE = "adapter_model.bin"
RUN_CONFIG = "run_config.yaml"
_MAX_TENSORS = 60_000
"""Twice what three modules for each expert of 120b take."""
_MARKER = b".adapter."
"""In the names of Megatron-Bridge's adapter tensors, and in no other's."""


@dataclass(frozen=True)
class Stored:
    """What a directory holds, before anything is known about its dialect."""

    root: Path
    container: str
    """`safetensors`, or `torch_dist` of Megatron-Bridge."""
    tensors: Mapping[str, tuple[Chunk, ...]]
    config: Mapping[str, Any]
    """adapter_config.json, or the section `peft` of run_config.yaml."""
    where: str
    """The file that `config` is from."""
    run: Mapping[str, Any]
    """All of run_config.yaml."""
    readme: Mapping[str, str]
    """Versions that the model card lists, by library in small letters."""
    also: frozenset[str]
    """Other files of the directory that tell who wrote it."""

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """The chunks of all tensors."""
        return tuple(chunk for chunks in self.tensors.values() for chunk in chunks)

    @property
    def files(self) -> tuple[FileRef, ...]:
        """All files that decide what it is."""
        held = {chunk.file: chunk.identity for chunk in self.chunks}
        beside = (CONFIG,) if self.container == "safetensors" else (".metadata", RUN_CONFIG)
        names = (*beside, *sorted(held))
        return tuple(FileRef(self.root, name, held.get(name)) for name in names)

    @property
    def peft_version(self) -> str | None:
        """The version of PEFT that the configuration names."""
        version = self.config.get("peft_version")
        return version if isinstance(version, str) else None


def is_adapter(root: Path) -> bool:
    """Whether a directory looks like an adapter, of PEFT's kind or of Megatron-Bridge's."""
    root = settled(root)
    if any((root / name).exists() for name in (CONFIG, WEIGHTS, PICKLE)):
        # Beside a model's configuration it is something else, which whoever opens that will name.
        return not (root / "config.json").exists()
    try:
        return bool(_bridge_directory(root))
    except GptossError:
        return False


def read_stored(root: Path) -> Stored:
    """The headers and the configuration of an adapter's directory.

    Raises UsageError for what is no such directory, InputError for what is not read, IntegrityError
    for what is damaged.
    """
    root = settled(root)
    if not root.is_dir():
        raise UsageError(f"{root}: {'not a directory' if root.exists() else 'no such directory'}")
    if lies(root, CONFIG) or lies(root, WEIGHTS):
        return _read_safetensors(root)
    if lies(root, PICKLE):
        raise InputError(_pickled(root))
    if directory := _bridge_directory(root):
        return _read_bridge(directory)
    inside = sorted(path.parent.name for path in root.glob(f"*/{CONFIG}"))
    if inside:
        raise UsageError(f"{root}: holds adapters in {', '.join(inside[:5])}: name one of them")
    raise UsageError(f"{root}: no adapter: neither {CONFIG} nor a torch_dist of adapter tensors")


def _pickled(root: Path) -> str:
    return (
        f"{root / PICKLE}: pickled weights are never loaded; save the adapter with "
        "safe_serialization=True"
    )


def _read_safetensors(root: Path) -> Stored:
    if not lies(root, CONFIG):
        raise IntegrityError(f"{root}: {WEIGHTS} without {CONFIG}")
    text = read_text(root, CONFIG, budget.TEXT.nbytes)
    if not lies(root, WEIGHTS):
        if lies(root, PICKLE):
            raise InputError(_pickled(root))
        unfinished = any(root.glob("*.incomplete"))
        advice = ": an unfinished download (*.incomplete); run it again" * unfinished
        raise IntegrityError(f"{root}: {CONFIG} without {WEIGHTS}{advice}")
    config = parse_object(str(root / CONFIG), text, budget.TEXT)
    header = safetensors.read_header(root, WEIGHTS, tensors=_MAX_TENSORS)
    also = frozenset(path.name for path in root.iterdir() if path.suffix == ".json")
    tensors = _by_name(root / WEIGHTS, header.chunks)
    return Stored(
        root, "safetensors", tensors, config, str(root / CONFIG), {}, _versions(root), also
    )


def _bridge_directory(root: Path) -> Path | None:
    """The iteration of a torch_dist that holds adapter tensors, None if this is none."""
    names = ("latest_checkpointed_iteration.txt", ".metadata", "metadata.json")
    if not any((root / name).exists() for name in names) and not any(root.glob("iter_*")):
        return None
    directory = find_iteration(root, None)
    with open_inside(directory, ".metadata") as file:
        # A look at the bytes of a pickle, which is read in earnest only if this is one.
        return directory if _MARKER in file.read(budget.PICKLE.nbytes) else None


def _read_bridge(root: Path) -> Stored:
    # Loaded only where there is such an adapter: both take a while to import.
    from gptoss_convert.containers import torch_dist
    from gptoss_convert.containers.plain_yaml import parse_yaml

    stored = torch_dist.read(root)
    tensors = _by_name(root, stored.chunks)
    where = str(root / RUN_CONFIG)
    if not lies(root, RUN_CONFIG):
        raise IntegrityError(f"{root}: no {RUN_CONFIG}, which says how strong the adapter is")
    run = parse_yaml(where, read_text(root, RUN_CONFIG, budget.YAML.nbytes))
    peft = run.get("peft") if isinstance(run, dict) else None
    if not isinstance(peft, dict):
        raise InputError(f"{where}: no section 'peft'")
    return Stored(root, "torch_dist", tensors, peft, f"{where}: peft", run, {}, frozenset())


def _by_name(where: Path, chunks: Iterable[Chunk]) -> dict[str, tuple[Chunk, ...]]:
    tensors: dict[str, list[Chunk]] = {}
    for chunk in chunks:
        tensors.setdefault(chunk.tensor, []).append(chunk)
    if not tensors:
        raise IntegrityError(f"{where}: holds no tensor")
    if len(tensors) > _MAX_TENSORS:
        raise InputError(f"{where}: {len(tensors)} tensors, at most {_MAX_TENSORS}")
    return {name: tuple(held) for name, held in tensors.items()}


def _versions(root: Path) -> dict[str, str]:
    """The library versions that the model card lists: `- PEFT 0.17.1`, `- Transformers: 5.0`."""
    try:
        text = read_text(root, "README.md", budget.TEXT.nbytes)
    except GptossError:
        return {}
    found = re.findall(r"(?m)^- ([A-Za-z]{2,20}):? (\d[\w.+@-]{0,60})$", text)
    return {library.lower(): version for library, version in found}

"""A checkpoint on disk: its format, configuration, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk, safetensors
from gptoss_convert.containers.paths import read_text
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.formats import sidecar
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.sidecar import Origin
from gptoss_convert.hub.names import Repository
from gptoss_convert.layouts.extents import Extent, extents
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.tables import load_table

CONFIG = "config.json"
MANIFEST = "gptoss-convert.json"
"""Written into every TARGET: what it holds, by file and by parameter."""
FORMATS = ("hf", "openai", "megatron")
_CASTS = frozenset(("F32", "F16"))
_MAX_CONFIG = 1 << 22
_NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".incomplete")
MAX_CARRIED = 256 << 20
"""Most bytes of such files, each and all together: they are held in memory."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: headers read and checked, no weight touched."""

    format: str
    variant: str
    root: Path
    config: Config
    hf_config: str | None
    """Text of Hugging Face's config.json, its own or the one it carries."""
    chunks: tuple[Chunk, ...]
    headers: Mapping[str, safetensors.Header]
    scales: sidecar.Sidecar | None = None
    beside: Path | None = None
    """Where the sidecar lies, if not in `root`."""
    carried: tuple[Path, ...] = ()
    """Files of the Hugging Face side that travel byte for byte: tokenizer, template, licence."""
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only this format can tell, for people."""
    repository: Repository | None = None
    """Where it is from, pinned to a commit, if not from a directory."""
    outline: Path | None = None
    """The directory that stood for the repository while its headers were read."""

    @property
    def place(self) -> str:
        """What people call it: the repository's name, or the directory."""
        return str(self.repository or self.root)

    @property
    def commit(self) -> str | None:
        """The repository's commit, None for a directory."""
        return self.repository.commit if self.repository else None

    @property
    def encoding(self) -> str:
        """`mxfp4` or `bf16`: how the experts are stored."""
        held = load_table(self.format).holds(self.variant)
        return "bf16" if "gate_up.weight" in held else "mxfp4"

    @property
    def label(self) -> str:
        """Format and encoding in one word: `hf-mxfp4`, `hf-bf16`, `openai`, `megatron`."""
        return f"hf-{self.encoding}" if self.format == "hf" else self.format

    def extents(self, casts: frozenset[str] = frozenset()) -> list[Extent]:
        """Where every parameter lies, sidecar scales included; each tensor's shape is checked."""
        sizes = load_model().sizes(self.config.numbers)
        tensors = load_table(self.format).tensors(self.variant, sizes)
        found = extents(str(self.root), tensors, self.chunks, casts, self.root)
        result = [extent for extent in found if not extent.alias]
        if self.scales is not None:
            place = str(self.base / sidecar.FOLDER)
            beside = load_table("scales").tensors("scales", sizes)
            result += extents(place, beside, self.scales.chunks, root=self.base)
        return result

    @property
    def base(self) -> Path:
        """The directory of everything that belongs to the checkpoint, the manifest included."""
        return self.beside or self.root

    def origin(self) -> Origin | None:
        """How this checkpoint's MXFP4 files are stored, or those it came from."""
        if self.scales is not None:
            return self.scales.origin
        if self.encoding != "mxfp4":
            return None
        return Origin(
            self.format,
            {name: header.text for name, header in self.headers.items()},
            safetensors.index_text(self.root),
            self.hf_config,
        )


@dataclass(frozen=True)
class Choices:
    """What opening a checkpoint cannot decide by itself."""

    format: str | None = None
    """One of FORMATS, where a directory holds several."""
    repair: bool = False
    """Read experts that were saved under the names of packed blocks."""
    iteration: int | None = None
    """Megatron: another iteration than the latest."""
    config: Path | None = None
    """Megatron: a Hugging Face config.json, where the checkpoint carries none."""
    vocab_size: int | None = None
    """Megatron: rows of the vocabulary without padding, where nothing says so."""
    strict: bool = False
    """Refuse what is only remarked on otherwise."""


DEFAULT = Choices()


def carried_files(root: Path) -> tuple[Path, ...]:
    """The files beside the weights that a served directory needs and no conversion changes."""
    return tuple(
        path
        for path in sorted(root.iterdir() if root.is_dir() else ())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_NOT_CARRIED)
        and path.name not in {CONFIG, MANIFEST, "dtypes.json"}
        and path.stat().st_size <= MAX_CARRIED
    )


def casts(allowed: bool) -> frozenset[str]:
    """The float dtypes accepted where the tables say BF16."""
    return _CASTS if allowed else frozenset()


def best_variant(format: str, config: Config, chunks: Sequence[Chunk]) -> str:
    """The variant whose names fit best; dtypes decide between packed blocks and mis-saved ones."""
    table = load_table(format)
    sizes = load_model().sizes(config.numbers)
    found = {(chunk.tensor, chunk.dtype == "U8") for chunk in chunks}

    def misfit(variant: str) -> int:
        expected = {(t.name, t.dtype == "U8") for t in table.tensors(variant, sizes)}
        return len(expected ^ found)

    return min(table.variants, key=misfit)


def read_config(root: Path, name: str = CONFIG) -> tuple[str, dict[str, Any]]:
    """The text and content of a config.json."""
    text = read_text(root, name, _MAX_CONFIG)
    return text, parse_object(str(root / name), text)

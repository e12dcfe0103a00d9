"""A checkpoint on disk: its format, configuration, and where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.containers import Chunk, Image, safetensors
from gptoss_convert.containers.budget import TEXT
from gptoss_convert.containers.paths import read_text
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import UsageError
from gptoss_convert.formats import sidecar
from gptoss_convert.formats.choices import Choices
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.repository import Repository
from gptoss_convert.formats.sidecar import Origin
from gptoss_convert.layouts.extents import Extent, extents
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table
from gptoss_convert.layouts.tables import Table

if TYPE_CHECKING:
    from gptoss_convert.formats.adapters.adapter import Adapter
    from gptoss_convert.layouts.updates import Update

CONFIG = "config.json"
MANIFEST = "gptoss-convert.json"
"""Written into every TARGET: what it holds, by file and by parameter."""
_CASTS = frozenset(("F32", "F16"))


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: headers read and checked, no weight touched."""

    kind: Format
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
    words: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    """What files other than config.json say of the model, as found, each with its place."""
    overruled: bool = False
    """Whether --config overrules what `words` say of the arithmetic."""
    as_stored: tuple[Chunk, ...] | None = None
    """Where its tensors lie as found, if `chunks` puts rows in order or leaves padding out."""
    glu_interleave: int | None = None
    """What --glu-interleave says of it."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only this format can tell, for people."""
    repository: Repository | None = None
    """Where it is from, pinned to a commit, if not from a directory."""
    outline: Path | None = None
    """The directory that stood for the repository while its headers were read."""
    cast: bool = False
    """Whether float32 and float16 are read as the BF16 that they round to."""
    adapter: Adapter | None = None
    """What is merged into it wherever its values are asked for."""
    naming: Table | None = None
    """The table of its names, where that is not its format's own."""
    dressed: bool = False
    """Whether its tensors' names, or its configuration, are not literally those of its files."""

    @property
    def table(self) -> Table:
        """The table that says what its tensors hold."""
        return self.naming or self.kind.table

    @property
    def format(self) -> str:
        """The name of its format."""
        return self.kind.name

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
        return encoding(self.table, self.variant)

    @property
    def label(self) -> str:
        """Format and encoding in one word: `hf-mxfp4`, `hf-bf16`, `openai`, `megatron`."""
        several = len({encoding(self.kind.table, one) for one in self.kind.table.variants}) > 1
        return f"{self.format}-{self.encoding}" if several else self.format

    def extents(self, casts: frozenset[str] = frozenset()) -> list[Extent]:
        """Where every parameter lies, sidecar scales included; each tensor's shape is checked."""
        sizes = load_model().sizes(self.config.numbers)
        tensors = self.table.tensors(self.variant, sizes)
        accepted = casts | (_CASTS if self.cast else frozenset())
        found = extents(str(self.root), tensors, self.chunks, accepted, self.root)
        result = [extent for extent in found if not extent.alias]
        if self.scales is not None:
            place = str(self.base / sidecar.FOLDER)
            beside = load_table("scales").tensors("scales", sizes)
            result += extents(place, beside, self.scales.chunks, root=self.base)
        return self.adapter.over(result) if self.adapter else result

    def files(self) -> frozenset[FileRef]:
        """The files that hold its tensors, whatever floats they are; each shape is checked."""
        return frozenset(file for extent in self.extents(casts(True)) for file in extent.files)

    def lasting(self, files: Iterable[FileRef]) -> list[FileRef]:
        """Those of some files that stay: what stood for a repository has gone."""
        gone = self.outline
        return [one for one in files if gone is None or not one.root.is_relative_to(gone)]

    @property
    def updates(self) -> tuple[tuple[Update, ...], str]:
        """(what the adapter adds to its parameters, how these sums are rounded)."""
        adapter = self.adapter
        return (adapter.updates, adapter.options.adapter_arithmetic) if adapter else ((), "exact")

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


DEFAULT = Choices()


@dataclass(frozen=True)
class Format:
    """One checkpoint format: all that the rest of the program asks of it."""

    name: str
    """What --from and --to call it."""
    load: Callable[[], Table]
    """Its mapping table; loaded when it is needed."""
    recognise: Callable[[Path], Path | None]
    """The folder of a directory that such a checkpoint lies in, None where there is none."""
    open: Callable[[Path, Choices], Checkpoint]
    """Open that folder, header by header; raises InputError or IntegrityError."""
    listed: Callable[[Set[str]], Set[str]]
    """Those of a repository's files that are such a checkpoint's; none where it holds none."""
    variant: Callable[[str, ImageOptions], str]
    """The variant that TARGET gets, for an encoding of experts; raises UsageError."""
    image: Callable[[Checkpoint, str, ImageOptions], tuple[Image, list[str]]]
    """The files of a TARGET of that variant, and what the user should know about them."""
    side: str | None = None
    """The folder in which the tokenizer and its like lie, None if the format keeps none."""
    published: bool = False
    """Whether OpenAI published models in it."""
    own: tuple[str, ...] = ()
    """The choices of how it is read that no other format has."""
    written: bool = True
    """Whether TARGET can have it; what trainers leave is read only (`read_only`)."""
    launch_words: Callable[[Config, str], Sequence[str]] | None = None
    """Lines on how a trainer loads a TARGET, for formats whose files do not say everything."""
    launch_page: Callable[[Config], str] | None = None
    """The same as a Markdown page."""

    @property
    def table(self) -> Table:
        """Its mapping table."""
        return self.load()


def read_only(
    name: str,
    load: Callable[[], Table],
    recognise: Callable[[Path], Path | None],
    open: Callable[[Path, Choices], Checkpoint],
) -> Format:
    """A format that is read and never written, from a directory alone."""

    def variant(encoding: str, options: ImageOptions) -> str:
        raise UsageError(f"--to {name}: {name} is read, not written")

    def image(source: Checkpoint, variant: str, options: ImageOptions) -> tuple[Image, list[str]]:
        raise UsageError(f"--to {name}: {name} is read, not written")

    return Format(
        name, load, recognise, open, lambda names: frozenset(), variant, image, written=False
    )


def casts(allowed: bool) -> frozenset[str]:
    """The float dtypes accepted where the tables say BF16."""
    return _CASTS if allowed else frozenset()


def encoding(table: Table, variant: str) -> str:
    """`mxfp4` or `bf16`: how a variant of a format stores the experts."""
    return "bf16" if "gate_up.weight" in table.holds(variant) else "mxfp4"


def best_variant(table: Table, config: Config, chunks: Sequence[Chunk]) -> str:
    """The variant whose names fit best; dtypes decide between packed blocks and mis-saved ones."""
    return min(table.variants, key=lambda variant: len(misfits(table, variant, config, chunks)))


def misfits(
    table: Table, variant: str, config: Config, chunks: Sequence[Chunk]
) -> Set[tuple[str, bool]]:
    """Tensors that only the variant or only the checkpoint has; whether they are packed bytes."""
    sizes = load_model().sizes(config.numbers)
    expected = {(name, dtype == "U8") for name, dtype in table.names(variant, sizes)}
    return expected ^ {(chunk.tensor, chunk.dtype == "U8") for chunk in chunks}


def read_config(root: Path, name: str = CONFIG) -> tuple[str, dict[str, Any]]:
    """The text and content of a config.json."""
    text = read_text(root, name, TEXT.nbytes)
    return text, parse_object(str(root / name), text, TEXT)

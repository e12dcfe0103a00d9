"""Opening a checkpoint: the format a directory holds, its configuration, where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gptoss_convert import config as configs
from gptoss_convert import megatron, sidecar, specimens
from gptoss_convert.config import Config
from gptoss_convert.containers import Chunk, safetensors, torch_dist
from gptoss_convert.containers.paths import open_inside
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.extents import Extent, extents
from gptoss_convert.model import load_model
from gptoss_convert.sidecar import Origin
from gptoss_convert.strict_json import parse_object
from gptoss_convert.tables import load_table

CONFIG = "config.json"
MANIFEST = "gptoss-convert.json"
"""Written into every TARGET: what it holds, by file and by parameter."""
BESIDE = "beside:"
"""Prefix of the sidecar's files, which may lie in another directory than the weights."""
FORMATS = ("hf", "openai", "megatron")
_CASTS = frozenset(("F32", "F16"))
_NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".incomplete")
_MAX_CARRIED = 256 << 20


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
        found = extents(str(self.root), tensors, self.chunks, casts)
        result = [extent for extent in found if not extent.alias]
        if self.scales is not None:
            place = str((self.beside or self.root) / sidecar.FOLDER)
            beside = load_table("scales").tensors("scales", sizes)
            found = extents(place, beside, self.scales.chunks)
            result += [replace(extent, file=BESIDE + extent.file) for extent in found]
        return result

    @property
    def roots(self) -> dict[str, Path]:
        """The directories that the extents' files lie in, by prefix of the file name."""
        return {"": self.root, BESIDE: self.beside or self.root}

    def origin(self) -> Origin | None:
        """How this checkpoint's MXFP4 files are stored, or those it came from."""
        if self.scales is not None:
            return self.scales.origin
        if self.encoding != "mxfp4":
            return None
        index = self.root / safetensors.INDEX
        return Origin(
            self.format,
            {name: header.text for name, header in self.headers.items()},
            index.read_text(encoding="utf-8") if index.exists() else None,
            self.hf_config,
        )


def formats_in(path: Path) -> dict[str, Path]:
    """The checkpoint formats that a directory holds, and the folder each lies in."""
    if not path.is_dir():
        what = "not a directory" if path.exists() else "no such directory"
        raise UsageError(f"{path}: {what}")
    found: dict[str, Path] = {}
    if (path / CONFIG).exists():
        keys = _read_config(path)[1]
        if "model_type" in keys or "architectures" in keys:
            found["hf"] = path
        elif "num_experts" in keys:
            found["openai"] = path
    if (path / "original" / CONFIG).exists():
        found["openai"] = path / "original"
    markers = (megatron.TRACKER, ".metadata", "metadata.json")
    if any((path / name).exists() for name in markers) or any(path.glob("iter_*")):
        found["megatron"] = path
    return found


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


def open_checkpoint(path: Path, choices: Choices = DEFAULT) -> Checkpoint:
    """Open a directory, header by header.

    Raises UsageError with the choices, InputError or IntegrityError with file and tensor.
    """
    found = formats_in(path)
    format = choices.format
    if format is None:
        if len(found) > 1:
            raise UsageError(f"{path}: holds {' and '.join(found)}; choose one with --from")
        format = next(iter(found), None)
    if format is None or format not in found:
        problem = specimens.recognise_files(path)
        held = f"holds {', '.join(found)}" if found else "no config.json and no torch_dist tracker"
        raise problem or InputError(f"{path}: not a GPT-OSS checkpoint: {held}")
    opened = _OPENERS[format](found[format], choices)
    if choices.strict and opened.notes:
        raise IntegrityError(f"{opened.notes[0]} (--strict)")
    return opened


def _open_hf(root: Path, choices: Choices) -> Checkpoint:
    if problem := specimens.recognise_files(root):
        raise problem
    text, content = _read_config(root)
    config = configs.from_hf(str(root / CONFIG), content)
    chunks, headers = safetensors.read_directory(root)
    if not chunks:
        raise IntegrityError(f"{root}: no *.safetensors files beside config.json")
    if problem := specimens.recognise_tensors(str(root), chunks):
        raise problem
    variant = _variant("hf", config, chunks)
    notes = [*config.notes, *safetensors.remarks(root, chunks)]
    if variant == "mis-saved":
        what = "BF16 experts under the names of packed blocks, as transformers 5.21 to 5.23 save"
        if not choices.repair:
            raise IntegrityError(f"{root}: {what}; pass --repair to read them as BF16")
        notes.append(f"repaired: {what}")
    elif ("quantization_config" in content) != (variant == "mxfp4"):
        says = "has" if "quantization_config" in content else "has no"
        held = "MXFP4" if variant == "mxfp4" else "BF16"
        problem = f"{root / CONFIG}: {says} quantization_config, the experts are {held}"
        if not choices.repair:
            raise IntegrityError(f"{problem}; pass --repair to go by the tensors")
        notes.append(problem)
    scales = sidecar.read(root) if variant != "mxfp4" else None
    carried = carried_files(root)
    return Checkpoint(
        "hf",
        variant,
        root,
        config,
        text,
        chunks,
        headers,
        scales,
        carried=carried,
        notes=tuple(notes),
    )


def _open_openai(root: Path, choices: Choices) -> Checkpoint:
    _, content = _read_config(root)
    config = configs.from_openai(str(root / CONFIG), content)
    chunks, headers = safetensors.read_directory(root)
    if not chunks:
        raise IntegrityError(f"{root}: no *.safetensors files beside config.json")
    notes = tuple(safetensors.remarks(root, chunks))
    return Checkpoint("openai", "mxfp4", root, config, None, chunks, headers, notes=notes)


def _open_megatron(root: Path, choices: Choices) -> Checkpoint:
    directory = torch_dist.find_iteration(root, choices.iteration)
    base = directory.parent if directory.name.startswith("iter_") else directory
    stored = torch_dist.read(directory)
    config, text, stated_by = _megatron_config(base, directory, stored, choices)
    chunks, padding = megatron.without_padding(stored.chunks, config.vocab_size)
    skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(stored.skipped.items()))
    notes = [*config.notes]
    if set(stored.skipped) - {"extra_state"}:
        notes.append(f"skipped entries that hold no weights: {skipped}")
    if padding:
        notes.append(f"vocabulary: {padding} rows of padding cut off")
    variant = _variant("megatron", config, chunks)
    fields = megatron.read_run_config(directory) or stored.common.get("args") or {}
    details = {
        "iteration": directory.name,
        "configuration": stated_by,
        "naming": variant,
        "saved_by": "gptoss-convert" if (base / MANIFEST).exists() else stored.saved_by,
        "parallel": megatron.parallel_layout(fields if isinstance(fields, dict) else {}),
        "chunks": len(stored.chunks),
        "skipped": dict(stored.skipped),
        "optimizer": bool(stored.skipped.get("optimizer")),
    }
    return Checkpoint(
        "megatron",
        variant,
        directory,
        config,
        text,
        chunks,
        {},
        sidecar.read(base),
        beside=base,
        carried=carried_files(base / megatron.HF_FOLDER),
        notes=tuple(notes),
        details=details,
    )


def _megatron_config(
    base: Path, directory: Path, stored: torch_dist.TorchDist, choices: Choices
) -> tuple[Config, str | None, str]:
    """The configuration, Hugging Face's text of it if any, and where it is from.

    From --config, else the carried config.json, else Bridge's or Megatron-LM's own fields. Fields
    that contradict it are refused; against --config they are only noted.
    """
    args = stored.common.get("args")
    fields = {
        str(directory / megatron.RUN_CONFIG): megatron.read_run_config(directory) or {},
        f"{directory}: args": args if isinstance(args, dict) else {},
    }
    stated = [(where, values) for where, values in fields.items() if values]
    folder = base / megatron.HF_FOLDER
    path = choices.config or (folder / CONFIG if (folder / CONFIG).exists() else None)
    text = None
    if path is not None:
        where = str(path)
        text, content = _read_config(path.parent, path.name)
        config = configs.from_hf(where, content)
        megatron.check_rows(where, config.vocab_size, choices.vocab_size)
    elif stated:
        where, values = stated[0]
        rows = megatron.vocabulary(where, values, stored.chunks, choices.vocab_size)
        config = megatron.from_fields(where, values, rows)
    else:
        raise InputError(
            f"{directory}: neither {megatron.HF_FOLDER}/{CONFIG}, {megatron.RUN_CONFIG} nor args "
            "tell the model's configuration; pass --config CONFIG_JSON"
        )
    if choices.config is None:
        for place, values in stated:
            megatron.check_fields(place, values, config)
        return config, text, where
    found = (megatron.contradictions(place, values, config) for place, values in stated)
    notes = (f"{problem}; going by {choices.config}" for problem in found if problem)
    return replace(config, notes=(*config.notes, *notes)), text, where


_OPENERS: Mapping[str, Callable[[Path, Choices], Checkpoint]] = {
    "hf": _open_hf,
    "openai": _open_openai,
    "megatron": _open_megatron,
}


def _variant(format: str, config: Config, chunks: Sequence[Chunk]) -> str:
    """The variant whose names fit best; dtypes decide between packed blocks and mis-saved ones."""
    table = load_table(format)
    sizes = load_model().sizes(config.numbers)
    found = {(chunk.tensor, chunk.dtype == "U8") for chunk in chunks}

    def misfit(variant: str) -> int:
        expected = {(t.name, t.dtype == "U8") for t in table.tensors(variant, sizes)}
        return len(expected ^ found)

    return min(table.variants, key=misfit)


def _read_config(root: Path, name: str = CONFIG) -> tuple[str, dict[str, Any]]:
    path = root / name
    with open_inside(root, name) as file:
        raw = file.read(1 << 22)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise IntegrityError(f"{path}: not UTF-8 at byte {error.start}") from None
    return text, parse_object(str(path), text)


def carried_files(root: Path) -> tuple[Path, ...]:
    """The files beside the weights that a served directory needs and no conversion changes."""
    return tuple(
        path
        for path in sorted(root.iterdir() if root.is_dir() else ())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_NOT_CARRIED)
        and path.name not in {CONFIG, MANIFEST, "dtypes.json"}
        and path.stat().st_size <= _MAX_CARRIED
    )


def casts(allowed: bool) -> frozenset[str]:
    """The float dtypes accepted where the tables say BF16."""
    return _CASTS if allowed else frozenset()

"""Opening a checkpoint: the format a directory holds, its configuration, where its tensors lie."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptoss_convert import config as configs
from gptoss_convert import sidecar, specimens
from gptoss_convert.config import Config
from gptoss_convert.containers import Chunk, safetensors
from gptoss_convert.containers.paths import open_inside
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.extents import Extent, extents
from gptoss_convert.model import load_model
from gptoss_convert.sidecar import Origin
from gptoss_convert.strict_json import parse_object
from gptoss_convert.tables import load_table

CONFIG = "config.json"
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
    config_text: str
    chunks: tuple[Chunk, ...]
    headers: Mapping[str, safetensors.Header]
    scales: sidecar.Sidecar | None = None
    carried: tuple[Path, ...] = ()
    """Files of the Hugging Face side that travel byte for byte: tokenizer, template, licence."""
    notes: tuple[str, ...] = ()

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
            place = f"{self.root}/{sidecar.FOLDER}"
            beside = load_table("scales").tensors("scales", sizes)
            result += extents(place, beside, self.scales.chunks)
        return result

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
            self.config_text,
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
    markers = ("latest_checkpointed_iteration.txt", ".metadata", "metadata.json")
    if any((path / name).exists() for name in markers) or any(path.glob("iter_*")):
        found["megatron"] = path
    return found


def open_checkpoint(path: Path, format: str | None = None, *, repair: bool = False) -> Checkpoint:
    """Open a directory; `format` chooses where it holds several.

    Raises UsageError with the choices, InputError or IntegrityError with file and tensor.
    """
    found = formats_in(path)
    if format is None:
        if len(found) > 1:
            raise UsageError(f"{path}: holds {' and '.join(found)}; choose one with --from")
        format = next(iter(found), None)
    if format is None or format not in found:
        problem = specimens.recognise_files(path)
        held = f"holds {', '.join(found)}" if found else "no config.json and no torch_dist tracker"
        raise problem or InputError(f"{path}: not a GPT-OSS checkpoint: {held}")
    return _OPENERS[format](found[format], repair)


def _open_hf(root: Path, repair: bool) -> Checkpoint:
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
    notes = list(config.notes)
    if variant == "mis-saved":
        what = "BF16 experts under the names of packed blocks, as transformers 5.21 to 5.23 save"
        if not repair:
            raise IntegrityError(f"{root}: {what}; pass --repair to read them as BF16")
        notes.append(f"repaired: {what}")
    elif ("quantization_config" in content) != (variant == "mxfp4") and not repair:
        says = "has" if "quantization_config" in content else "has no"
        raise IntegrityError(
            f"{root / CONFIG}: {says} quantization_config, the experts are "
            f"{'MXFP4' if variant == 'mxfp4' else 'BF16'}; pass --repair to go by the tensors"
        )
    scales = sidecar.read(root) if variant != "mxfp4" else None
    carried = carried_files(root)
    return Checkpoint(
        "hf", variant, root, config, text, chunks, headers, scales, carried, tuple(notes)
    )


def _open_openai(root: Path, repair: bool) -> Checkpoint:
    text, content = _read_config(root)
    config = configs.from_openai(str(root / CONFIG), content)
    chunks, headers = safetensors.read_directory(root)
    if not chunks:
        raise IntegrityError(f"{root}: no *.safetensors files beside config.json")
    return Checkpoint("openai", "mxfp4", root, config, text, chunks, headers)


def _open_megatron(root: Path, repair: bool) -> Checkpoint:
    raise InputError(f"{root}: torch_dist is not supported yet")


_OPENERS: Mapping[str, Callable[[Path, bool], Checkpoint]] = {
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


def _read_config(root: Path) -> tuple[str, dict[str, Any]]:
    path = root / CONFIG
    with open_inside(root, CONFIG) as file:
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
        for path in sorted(root.iterdir())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_NOT_CARRIED)
        and path.name not in {CONFIG, "gptoss-convert.json", "dtypes.json"}
        and path.stat().st_size <= _MAX_CARRIED
    )


def casts(allowed: bool) -> frozenset[str]:
    """The float dtypes accepted where the tables say BF16."""
    return _CASTS if allowed else frozenset()

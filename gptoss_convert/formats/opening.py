"""Opening a checkpoint: which format a directory holds, and each format's way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk, safetensors, torch_dist
from gptoss_convert.containers.paths import read_text
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import sidecar
from gptoss_convert.formats import unsupported as specimens
from gptoss_convert.formats.checkpoint import (
    CONFIG,
    DEFAULT,
    MANIFEST,
    Checkpoint,
    Choices,
    carried_files,
)
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.megatron import fields as megatron
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.tables import load_table

_MAX_CONFIG = 1 << 22


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
        notes.append(f"{what}; --repair reads them as BF16")
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
    text = read_text(root, name, _MAX_CONFIG)
    return text, parse_object(str(root / name), text)

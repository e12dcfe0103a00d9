"""Opening a checkpoint: which format a directory holds, and each format's way in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from gptoss_convert.containers import safetensors
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import sidecar
from gptoss_convert.formats import unsupported as specimens
from gptoss_convert.formats.checkpoint import (
    CONFIG,
    DEFAULT,
    Checkpoint,
    Choices,
    best_variant,
    carried_files,
    read_config,
)
from gptoss_convert.formats.megatron import fields as megatron
from gptoss_convert.formats.megatron.opening import open_megatron


def formats_in(path: Path) -> dict[str, Path]:
    """The checkpoint formats that a directory holds, and the folder each lies in."""
    if not path.is_dir():
        what = "not a directory" if path.exists() else "no such directory"
        raise UsageError(f"{path}: {what}")
    found: dict[str, Path] = {}
    if (path / CONFIG).exists():
        keys = read_config(path)[1]
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
    text, content = read_config(root)
    config = configs.from_hf(str(root / CONFIG), content)
    chunks, headers = safetensors.read_directory(root)
    if not chunks:
        raise IntegrityError(f"{root}: no *.safetensors files beside config.json")
    if problem := specimens.recognise_tensors(str(root), chunks):
        raise problem
    variant = best_variant("hf", config, chunks)
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
    _, content = read_config(root)
    config = configs.from_openai(str(root / CONFIG), content)
    chunks, headers = safetensors.read_directory(root)
    if not chunks:
        raise IntegrityError(f"{root}: no *.safetensors files beside config.json")
    notes = tuple(safetensors.remarks(root, chunks))
    return Checkpoint("openai", "mxfp4", root, config, None, chunks, headers, notes=notes)


_OPENERS: Mapping[str, Callable[[Path, Choices], Checkpoint]] = {
    "hf": _open_hf,
    "openai": _open_openai,
    "megatron": open_megatron,
}

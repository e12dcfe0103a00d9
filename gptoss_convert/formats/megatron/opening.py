"""Opening a Megatron checkpoint: its iteration, its configuration and where that is from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gptoss_convert.containers import torch_dist
from gptoss_convert.errors import InputError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import sidecar
from gptoss_convert.formats.carried import carried_files
from gptoss_convert.formats.checkpoint import (
    CONFIG,
    MANIFEST,
    Checkpoint,
    Choices,
    Format,
    best_variant,
    read_config,
)
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.megatron import fields as megatron


def open_megatron(kind: Format, root: Path, choices: Choices) -> Checkpoint:
    """Open the asked or the latest iteration; raises as `open_checkpoint` does."""
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
    variant = best_variant(kind.table, config, chunks)
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
        kind,
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
        text, content = read_config(path.parent, path.name)
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

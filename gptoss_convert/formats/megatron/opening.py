"""Opening a Megatron checkpoint: its iteration, its configuration and where that is from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gptoss_convert.containers import torch_dist
from gptoss_convert.containers.paths import settled
from gptoss_convert.containers.torch_dist import TorchDist
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats import dcp, sidecar, unsupported
from gptoss_convert.formats.checkpoint import (
    MANIFEST,
    Checkpoint,
    Choices,
    Format,
    best_variant,
    read_config,
)
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.config.numbers import made
from gptoss_convert.formats.megatron import (
    fields,
    files,
    interleave,
    legacy,
    nested,
    stated,
    vocabulary,
)
from gptoss_convert.formats.megatron.stated import Stated


def open_megatron(kind: Format, root: Path, choices: Choices) -> Checkpoint:
    """Open the asked or the latest iteration; raises as `open_checkpoint` does."""
    directory = torch_dist.find_iteration(root, choices.iteration, legacy=True)
    if dcp.is_nested(directory):
        raise InputError(f"{directory}: {unsupported.NESTED}")
    # An iteration may be a link within the checkpoint, which says nothing of where that lies.
    base = files.root_of(root) if directory == root else root
    stored = _stored(directory, choices)
    said = _stated(directory, stored)
    config, text, stated_by = _configuration(directory, base, stored, said, choices)
    chunks, padding = vocabulary.without_padding(stored.chunks, config.vocab_size)
    run = interleave.run_length(said, choices.glu_interleave)
    interleave.check_parallel(said, run)
    chunks = interleave.contiguous(chunks, run)
    skipped = ", ".join(f"{count} {kind}" for kind, count in sorted(stored.skipped.items()))
    notes = [*config.notes, *stored.notes]
    if set(stored.skipped) - {"extra_state"}:
        notes.append(f"skipped entries that hold no weights: {skipped}")
    if padding:
        notes.append(f"vocabulary: {padding} rows of padding cut off")
    variant = best_variant(kind.table, config, chunks)
    details = {
        "iteration": directory.name,
        "configuration": stated_by,
        "naming": variant,
        "saved_by": "gptoss-convert" if (base / MANIFEST).exists() else stored.saved_by,
        "parallel": fields.parallel_layout(said[0].raw if said else {}),
        "glu_interleave": run,
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
        carried=files.carried(directory, base),
        notes=tuple(notes),
        words=tuple((one.where, one.raw) for one in said),
        overruled=choices.config is not None,
        as_stored=stored.chunks,
        glu_interleave=choices.glu_interleave,
        details=details,
    )


def _stored(directory: Path, choices: Choices) -> TorchDist:
    """What an iteration holds, in whichever of Megatron's forms."""
    if not files.is_legacy(directory):
        return nested.read(directory, choices.from_main_params)
    if choices.from_main_params:
        raise UsageError(
            f"{directory}: --from-main-params: the legacy format has no names for them"
        )
    return legacy.read(directory)


def _stated(directory: Path, stored: TorchDist) -> list[Stated]:
    """What Bridge's run_config.yaml and Megatron-LM's args state, whichever there are."""
    found: list[Stated] = []
    if model := files.read_run_config(directory):
        model = nested.without_pairs(str(directory / files.RUN_CONFIG), model)
        found.append(stated.of_provider(str(directory / files.RUN_CONFIG), model))
    args = stored.common.get("args")
    if isinstance(args, dict) and args:
        args = nested.without_pairs(f"{directory}: args", args)
        found.append(stated.of_args(f"{directory}: args", args))
    return found


def _configuration(
    directory: Path, base: Path, stored: TorchDist, said: list[Stated], choices: Choices
) -> tuple[Config, str | None, str]:
    """The configuration, Hugging Face's text of it if any, and where it is from.

    From --config, else the carried config.json, else what Megatron's own fields state. Fields
    that contradict it are refused; against --config they are only noted.
    """
    path = settled(choices.config) if choices.config else files.hf_config(directory, base)
    if path is not None:
        text, content = read_config(path.parent, path.name)
        config = configs.from_hf(str(path), content)
        vocabulary.check_rows(str(path), config.vocab_size, choices.vocab_size)
        if choices.config is None:
            for one in said:
                fields.check_fields(one, config)
            return config, text, str(path)
        found = (fields.contradictions(one, config) for one in said)
        notes = tuple(f"{problem}; going by {path}" for problem in found if problem)
        return replace(config, notes=(*config.notes, *notes)), text, str(path)
    if not said:
        raise InputError(
            f"{directory}: neither {files.HF_FOLDER}/config.json, {files.RUN_CONFIG} nor args "
            "tell the model's configuration; pass --config CONFIG_JSON"
        )
    first, *others = said
    numbers = fields.take(first)
    rows = vocabulary.rows(first, stored.chunks, choices.vocab_size)
    longest, remark = _longest(directory, base, said, numbers["max_position_embeddings"])
    numbers = {**numbers, "max_position_embeddings": longest}
    config = made(first.where, **numbers, vocab_size=rows)
    for one in others:
        fields.check_fields(one, config)
    return replace(config, notes=(*fields.unusual(config), *remark)), None, first.where


def _longest(
    directory: Path, base: Path, said: list[Stated], implied: int
) -> tuple[int, tuple[str, ...]]:
    """`max_position_embeddings`, and a remark where Megatron's fields leave it open.

    A trainer's argument of that name is the length that it trained with, and changes no output of
    a model with YaRN; in what this program wrote it is the model's.
    """
    name = "max_position_embeddings"
    stated = next((one.raw[name] for one in said if type(one.raw.get(name)) is int), None)
    if stated == implied:
        return implied, ()
    if stated is not None and stated > 0 and (base / MANIFEST).exists():
        return stated, ()
    found = "not stated" if stated is None else f"{stated} in args, which may be training's"
    taken = f"taken as {implied}, YaRN's original length times its factor"
    return implied, (f"{name} is {found}: {taken}; --config CONFIG_JSON says otherwise",)

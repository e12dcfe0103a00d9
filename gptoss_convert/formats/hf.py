"""Hugging Face directories: safetensors beside config.json, experts as MXFP4 or as BF16."""

from __future__ import annotations

from collections.abc import Set
from functools import partial
from pathlib import Path

from gptoss_convert.containers import Image, safetensors
from gptoss_convert.containers.paths import lies
from gptoss_convert.containers.sharded_safetensors import is_sharded
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats import (
    carried,
    openai,
    quantised,
    shards,
    sidecar,
    torch_files,
    unsupported,
)
from gptoss_convert.formats import config as configs
from gptoss_convert.formats.checkpoint import (
    CONFIG,
    Checkpoint,
    Choices,
    Format,
    misfits,
    read_config,
)
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.heads import configure, require_rows
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.names import left_out, read_names
from gptoss_convert.formats.trained import (
    MIS_SAVED,
    best_naming,
    lacking_in,
    repaired,
    skipped_notes,
    told,
    trainer_tables,
    wrong_rows,
)
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table

_WRITERS = {
    "mis-saved": "transformers 5.21 to 5.23",
    "mis-saved-rows": "torchtitan's export",
    "expert-rows": "unsloth",
    "expert-split": "llm-compressor before #2647",
    "expert-halves": "llm-compressor from #2647 to #3100",
    "expert-gates": "llm-compressor since #3100",
}
"""Whose arrangements the variants are that are read only."""
_PUBLISHED_BYTES = 4_800_000_000


def _recognise(path: Path) -> Path | None:
    if not lies(path, CONFIG) or is_sharded(path):
        return None
    if torch_files.holds(path):
        return None
    keys = read_config(path)[1]
    return path if "model_type" in keys or "architectures" in keys else None


def _open(root: Path, choices: Choices) -> Checkpoint:
    if problem := unsupported.recognise_files(root, claimed=True):
        raise problem
    path = choices.config or root / CONFIG
    content = read_config(path.parent, path.name)[1]
    configs.require_gpt_oss(str(path), content)
    stored, headers = safetensors.read_directory(root, left_out(choices.drop))
    if not stored:
        raise unsupported.no_weights(root)
    found = quantised.decoded(str(path), root, stored, content.get("quantization_config"))
    held = (chunk.tensor for chunk in found.chunks)
    names = read_names(str(root), held, trainer_tables(), choices.drop)
    chunks = names.chunks(found.chunks)
    if problem := unsupported.recognise_tensors(str(root), chunks):
        raise problem
    tables = names.tables or (FORMAT.table,)
    said = configure(path, tables, chunks, choices.vocab_size)
    table, variant = best_naming(root, tables, said.config, said.chunks, choices)
    require_rows(path, said.config, tables, wrong_rows(table, variant, said.config, said.chunks))
    notes = [*said.config.notes, *said.notes, *found.notes]
    notes += [*safetensors.remarks(root, stored), *skipped_notes(names.skipped)]
    # A config.json from elsewhere, often the base model's, says nothing of how these are stored.
    own = configs.quantization(str(path), content)
    method = None if choices.config or found.decoded else own
    if method not in {None, "mxfp4"} and misfits(table, variant, said.config, said.chunks):
        raise InputError(f"{path}: quantised with {method!r}, {quantised.why_not(str(method))}")
    notes += repaired(root, variant, choices)
    stated = choices.config is None and variant not in MIS_SAVED
    if stated and method != ("mxfp4" if variant == "mxfp4" else None):
        says = f"has quantization_config {method!r}" if method else "has no quantization_config"
        held = "MXFP4" if variant == "mxfp4" else "BF16"
        problem = f"{path}: {says}, the experts are {held}"
        if not choices.repair:
            raise IntegrityError(f"{problem}; pass --repair to go by the tensors")
        notes.append(problem)
    scales = sidecar.read(root) if variant != "mxfp4" else None
    dressed = path.parent != root or {c.tensor for c in stored} != {c.tensor for c in said.chunks}
    details = {
        "form": "safetensors, as a trainer or a tool saved them",
        "written_by": _WRITERS.get(variant, "whatever merged or wrapped the model"),
        "configuration": str(path),
        "naming": f"{table.format}: {variant}",
        **told(names, stored),
        "lacks": lacking_in([root]),
    }
    return Checkpoint(
        FORMAT,
        variant,
        root,
        said.config,
        said.text,
        said.chunks,
        headers,
        scales,
        carried=carried.carried_files(root),
        notes=tuple(notes),
        naming=table,
        dressed=dressed,
        details=details if dressed or variant in _WRITERS else {},
    )


def _listed(names: Set[str]) -> Set[str]:
    beside = {name for name in names if "/" not in name}
    return beside | set(filter(sidecar.holds, names)) if CONFIG in beside else frozenset()


def _variant(encoding: str, options: ImageOptions) -> str:
    return encoding


def _image(source: Checkpoint, variant: str, options: ImageOptions) -> tuple[Image, list[str]]:
    weights = shards.image(STYLE, FORMAT.table, source, variant, options)
    side = carried.sidecar_image(source, variant, options)
    copies, notes = carried.copies(source, options)
    closing = [*copies, (CONFIG, _config(source, variant))]
    notes += _corrections(source)
    files = (*weights.files, *side.files)
    chunks = (*weights.chunks, *side.chunks)
    # The index goes last: a reader that sees it may rely on every shard.
    return Image(files, chunks, (*closing, *side.closing, *weights.closing)), notes


def _config(source: Checkpoint, variant: str) -> bytes:
    """config.json of the target; the MXFP4 source's own bytes where nothing changed since."""
    base = parse_object(CONFIG, source.hf_config) if source.hf_config else None
    origin = source.origin() if source.scales is not None else None
    if variant == "mxfp4" and origin is not None and origin.format == "hf" and origin.config:
        before = parse_object(f"{sidecar.FOLDER}/{sidecar.ORIGIN}: config", origin.config)
        config = configs.from_hf(sidecar.ORIGIN, before)
        unchanged = configs.hf_json(config, before, mxfp4=False).decode()
        untrue = configs.corrections(config, before)
        # Nobody else checks what a sidecar says of the experts' encoding.
        same = before.get("quantization_config") == configs.MXFP4_CONFIG
        if same and not untrue and source.hf_config in (origin.config, unchanged):
            return origin.config.encode()
    return configs.hf_json(source.config, base, mxfp4=variant == "mxfp4")


def _corrections(source: Checkpoint) -> list[str]:
    """What SOURCE's config.json says and TARGET's does not, in words."""
    if source.hf_config is None:
        return []
    return configs.corrections(source.config, parse_object(CONFIG, source.hf_config))


def _published(config: Config) -> shards.Published:
    """Shards in the order of the sorted names of `original/`, at most 4.8 GB each."""
    sizes = load_model().sizes(config.numbers)
    holder = {
        (param, tensor.bound.get("layer")): tensor
        for tensor in FORMAT.table.tensors("mxfp4", sizes)
        for param in tensor.rule.params
    }
    ordered = [
        holder[param, original.bound.get("layer")]
        for original in sorted(openai.FORMAT.table.tensors("mxfp4", sizes), key=lambda t: t.name)
        for param in original.rule.params
    ]
    found = shards.packed([[spec] for spec in shards.specs_of(ordered)], _PUBLISHED_BYTES)
    last = len(found) - 1
    return {f"model-{i:05d}-of-{last:05d}.safetensors": shard for i, shard in enumerate(found)}


STYLE = shards.Style("hf", "-", "\n", _published)
FORMAT = Format(
    "hf",
    partial(load_table, "hf"),
    _recognise,
    _open,
    _listed,
    _variant,
    _image,
    side="",
    published=True,
)

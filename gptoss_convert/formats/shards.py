"""Which tensor goes to which safetensors file: by size, as released, or as it was before."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence

from gptoss_convert.containers import TensorSpec, safetensors
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import GptossError, UsageError
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.sidecar import FOLDER, ORIGIN, Origin
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.tables import Tensor, load_table

DEFAULT_SHARD_BYTES = 5_000_000_000
_HF_PUBLISHED_BYTES = 4_800_000_000
_OPENAI_PUBLISHED_BYTES = 10 << 30
_PADDING = {"by size": safetensors.PAGE, "published": 8}

Headers = dict[str, str]
"""Header text by file name, in the order of the files."""


def by_size(format: str, tensors: Iterable[Tensor], limit: int) -> Headers:
    """Shards of at most `limit` bytes in table order; blocks and their scales stay together."""
    specs = specs_of(tensors)
    shards = _pack(_pairs(specs), limit)
    metadata = {"format": "pt"}
    names = _names(format, len(shards))
    return {
        name: safetensors.header_text(
            safetensors.aligned_order(shard), metadata, _PADDING["by size"]
        )
        for name, shard in zip(names, shards, strict=True)
    }


def published(format: str, variant: str, config: Config) -> Headers:
    """Names, numbering, order and boundaries of OpenAI's own files; exact for 20b.

    Hugging Face's files follow the sorted names of `original/` and a limit of 4.8 GB; `original/`
    is one file for 20b and is cut at 10 GiB for 120b. Raises UsageError for BF16 experts.
    """
    if variant != "mxfp4":
        raise UsageError("--shards published: OpenAI published MXFP4 only; add --dtype mxfp4")
    sizes = load_model().sizes(config.numbers)
    originals = sorted(load_table("openai").tensors("mxfp4", sizes), key=lambda t: t.name)
    if format == "openai":
        limit = _OPENAI_PUBLISHED_BYTES if config.size == "120b" else 1 << 62
        shards = _pack([[spec] for spec in specs_of(originals)], limit)
        names = _names(format, len(shards))
    else:
        holder = {
            (param, tensor.bound.get("layer")): tensor
            for tensor in load_table("hf").tensors("mxfp4", sizes)
            for param in tensor.rule.params
        }
        ordered = [
            holder[param, original.bound.get("layer")]
            for original in originals
            for param in original.rule.params
        ]
        shards = _pack([[spec] for spec in specs_of(ordered)], _HF_PUBLISHED_BYTES)
        last = len(shards) - 1
        names = [f"model-{i:05d}-of-{last:05d}.safetensors" for i in range(len(shards))]
    return {
        name: safetensors.header_text(safetensors.reference_order(shard), {}, _PADDING["published"])
        for name, shard in zip(names, shards, strict=True)
    }


def restored(format: str, tensors: Iterable[Tensor], origin: Origin | None) -> Headers | None:
    """The headers of the source that a sidecar remembers, if they hold exactly these tensors."""
    if origin is None or origin.format != format:
        return None
    expected = {(spec.name, spec.dtype, spec.shape) for spec in specs_of(tensors)}
    found: list[tuple[str, str, tuple[int, ...]]] = []
    try:
        for name, text in origin.headers.items():
            _, chunks = safetensors.file_image(name, text)
            found += [(chunk.tensor, chunk.dtype, chunk.shape) for chunk in chunks]
    except GptossError:
        return None
    return dict(origin.headers) if len(found) == len(expected) and set(found) == expected else None


def index_json(headers: Mapping[str, str], format: str, origin: Origin | None) -> bytes | None:
    """The index of several shards, None for a single file; as before where the files are."""
    weight_map: dict[str, str] = {}
    total = 0
    for name, text in headers.items():
        entries = parse_object(name, text)
        entries.pop("__metadata__", None)
        weight_map |= dict.fromkeys(entries, name)
        total += sum(end - start for start, end in (e["data_offsets"] for e in entries.values()))
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    if origin is not None and origin.index is not None:
        where = f"{FOLDER}/{ORIGIN}: index"
        if parse_object(where, origin.index).get("weight_map") == weight_map:
            return origin.index.encode()
    if [*headers] == ["model.safetensors"]:
        return None
    if format == "hf" and next(iter(headers)).startswith("model-00000-of-"):
        return json.dumps(content).encode()
    end = "" if format == "openai" else "\n"
    return (json.dumps(content, indent=2, sort_keys=True) + end).encode()


def specs_of(tensors: Iterable[Tensor]) -> list[TensorSpec]:
    """What a container has to store for these tensors."""
    return [TensorSpec(t.name, t.dtype, t.shape, t.chunk_shape) for t in tensors]


def _pairs(specs: Sequence[TensorSpec]) -> list[list[TensorSpec]]:
    """One list a tensor, but blocks together with the scales behind them."""
    groups: list[list[TensorSpec]] = []
    for spec in specs:
        if spec.dtype == "U8" and groups and groups[-1][-1].dtype == "U8" and len(groups[-1]) == 1:
            groups[-1].append(spec)
        else:
            groups.append([spec])
    return groups


def _pack(groups: Iterable[Sequence[TensorSpec]], limit: int) -> list[list[TensorSpec]]:
    """Fill shards in order; a group larger than the limit gets a shard of its own."""
    shards: list[list[TensorSpec]] = [[]]
    used = 0
    for group in groups:
        nbytes = sum(spec.nbytes for spec in group)
        if shards[-1] and used + nbytes > limit:
            shards.append([])
            used = 0
        shards[-1].extend(group)
        used += nbytes
    return shards


def _names(format: str, count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    dash = "--" if format == "openai" else "-"
    return [f"model{dash}{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]

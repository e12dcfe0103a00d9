"""Which tensor goes to which safetensors file: by size, as released, or as it was before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from gptoss_convert.containers import Image, TensorSpec, safetensors, safetensors_writer
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import GptossError, UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.sidecar import FOLDER, ORIGIN, Origin
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.tables import Table, Tensor

_PADDING = {"by size": safetensors_writer.PAGE, "published": 8}

Headers = dict[str, str]
"""Header text by file name, in the order of the files."""
Published = Mapping[str, Sequence[TensorSpec]]
"""The tensors of each file, by name."""


@dataclass(frozen=True)
class Style:
    """How a format's safetensors files are named, indexed and published."""

    format: str
    dash: str
    """Between `model` and the number of a shard."""
    end: str
    """What the index ends with."""
    published: Callable[[Config], Published]
    """Names, numbering, order and boundaries of OpenAI's own MXFP4 files; exact for 20b."""

    def names(self, count: int) -> list[str]:
        """The names of so many shards."""
        if count == 1:
            return ["model.safetensors"]
        numbers = range(1, count + 1)
        return [f"model{self.dash}{i:05d}-of-{count:05d}.safetensors" for i in numbers]


def image(
    style: Style, table: Table, source: Checkpoint, variant: str, options: ImageOptions
) -> Image:
    """The files of TARGET's weights, sharded as the options ask.

    Raises UsageError if BF16 experts are to be sharded as published.
    """
    sizes = load_model().sizes(source.config.numbers)
    tensors = list(table.tensors(variant, sizes))
    origin = source.origin() if source.scales is not None else None
    headers = None
    if options.shards == "published":
        headers = _as_published(style, variant, source.config)
    elif options.shards == "auto":
        headers = restored(style.format, tensors, origin)
    if headers is None:
        headers = by_size(style, tensors, options.max_shard_size)
    index = index_json(headers, style.end, origin)
    return safetensors_writer.image(headers, (safetensors.INDEX, index) if index else None)


def _as_published(style: Style, variant: str, config: Config) -> Headers:
    if variant != "mxfp4":
        raise UsageError("--shards published: OpenAI published MXFP4 only; add --dtype mxfp4")
    return {
        name: safetensors_writer.header_text(
            safetensors_writer.reference_order(shard), {}, _PADDING["published"]
        )
        for name, shard in style.published(config).items()
    }


def by_size(style: Style, tensors: Iterable[Tensor], limit: int) -> Headers:
    """Shards of at most `limit` bytes in table order; blocks and their scales stay together."""
    specs = specs_of(tensors)
    shards = packed(_pairs(specs), limit)
    metadata = {"format": "pt"}
    names = style.names(len(shards))
    return {
        name: safetensors_writer.header_text(
            safetensors_writer.aligned_order(shard), metadata, _PADDING["by size"]
        )
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
            _, chunks = safetensors_writer.file_image(name, text)
            found += [(chunk.tensor, chunk.dtype, chunk.shape) for chunk in chunks]
    except GptossError:
        return None
    return dict(origin.headers) if len(found) == len(expected) and set(found) == expected else None


def index_json(headers: Mapping[str, str], end: str, origin: Origin | None) -> bytes | None:
    """The index of several shards, None for a single file.

    A remembered index is used again, byte for byte, if every tensor is in the same file as before.
    """
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
    if next(iter(headers)).startswith("model-00000-of-"):
        return json.dumps(content).encode()
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


def packed(groups: Iterable[Sequence[TensorSpec]], limit: int) -> list[list[TensorSpec]]:
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

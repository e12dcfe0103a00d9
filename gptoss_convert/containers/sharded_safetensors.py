"""Safetensors that several ranks wrote by themselves: each file holds boxes of the tensors.

The header of each says where its boxes begin (`DCP_SHARDING_INFO`). Source: torch's
distributed/checkpoint/hf_storage.py, `HuggingFaceStorageWriter(save_distributed=True)`.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.containers import Chunk
from gptoss_convert.containers.safetensors import MAX_HEADER, SHARDING, Left, read_header
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import IntegrityError

_PATTERN = "shard-*-model-*-of-*.safetensors"
_NAME = re.compile(r"shard-(\d{5,})-model-(\d{5,})-of-(\d{5,})\.safetensors")


def is_sharded(root: Path) -> bool:
    """Whether such files lie in a directory."""
    return any(_NAME.fullmatch(path.name) for path in root.glob(_PATTERN))


def read_shards(root: Path, left: Left = lambda name: False) -> tuple[Chunk, ...]:
    """All boxes of the shards in `root`, found to cover each tensor once.

    What is `left` out later comes once and unplaced. Raises InputError or IntegrityError naming
    file and tensor.
    """
    names = sorted(path.name for path in root.glob(_PATTERN) if _NAME.fullmatch(path.name))
    _require_all(root, names)
    boxes: dict[str, list[Chunk]] = defaultdict(list)
    aside: dict[str, Chunk] = {}
    room = MAX_HEADER
    for name in names:
        # As they come: many names may stand for one large header.
        header = read_header(root, name, room, left=left)
        room -= len(header.text)
        offsets = _offsets(root / name, header.metadata)
        for chunk in header.chunks:
            if left(chunk.tensor):
                aside.setdefault(chunk.tensor, chunk)
                continue
            boxes[chunk.tensor].append(_placed(root / name, chunk, offsets.get(chunk.tensor)))
    whole = (chunk for tensor, held in boxes.items() for chunk in _whole(root, tensor, held))
    return (*whole, *aside.values())


def _require_all(root: Path, names: Sequence[str]) -> None:
    """Ranks are counted from 1 without gaps; how many there were, no file says."""
    ranks = {int(match[1]) for name in names if (match := _NAME.fullmatch(name))}
    if missing := sorted(set(range(1, max(ranks, default=0) + 1)) - ranks):
        raise IntegrityError(
            f"{root}: the shards of {len(missing)} of {max(ranks)} ranks are missing, that of rank "
            f"{missing[0]} (shard-{missing[0]:05d}-model-*) the first"
        )


def _offsets(where: Path, metadata: Any) -> dict[str, Any]:
    if SHARDING not in metadata:
        raise IntegrityError(f"{where}: its header does not say which part it is: no {SHARDING}")
    return parse_object(f"{where}: {SHARDING}", metadata[SHARDING])


def _placed(where: Path, chunk: Chunk, said: Any) -> Chunk:
    """The chunk where its header says that it begins; its tensor's shape is still its own."""
    start = said.get("saved_offsets") if isinstance(said, dict) else None
    axes = len(chunk.extent)
    if (
        not isinstance(start, list)
        or len(start) != axes
        or any(type(n) is not int or not 0 <= n < 1 << 48 for n in start)
    ):
        raise IntegrityError(
            f"{where}: {chunk.tensor}: saved_offsets {start!r:.80}, expects {axes} numbers"
        )
    return replace(chunk, start=tuple(start))


def _whole(root: Path, tensor: str, boxes: Sequence[Chunk]) -> list[Chunk]:
    """The boxes of one tensor with the shape that they make up; those of no row are left out."""
    # Whether a directory is of this kind is asked of all; few are.
    from gptoss_convert.containers.torch_dist.coverage import require_tiling
    from gptoss_convert.containers.torch_dist.metadata import ChunkBox

    first = boxes[0]
    if any((c.dtype, len(c.start)) != (first.dtype, len(first.start)) for c in boxes):
        raise IntegrityError(f"{root}: {tensor}: its shards differ in dtype or number of axes")
    ends = [[s + e for s, e in zip(c.start, c.extent, strict=True)] for c in boxes if c.nbytes]
    shape = tuple(map(max, zip(*ends, strict=True)))
    held = [replace(c, shape=shape) for c in boxes if c.nbytes]
    try:
        places = [ChunkBox(c.start, c.extent) for c in held]
        if len(set(places)) < len(places):
            raise IntegrityError("two shards hold the same part")
        require_tiling(shape, places)
    except IntegrityError as error:
        raise IntegrityError(f"{root}: {tensor}: {error}") from None
    return held

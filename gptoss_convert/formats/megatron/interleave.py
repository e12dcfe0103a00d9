"""The rows of fc1 where gate and up alternate by runs: `moe_mlp_glu_interleave_size` of core 0.18.

Memory then holds rows g0..k-1, u0..k-1, gk.. of each expert instead of all gate rows and all up
rows (`TEGroupedMLP._remove_glu_interleaving`). Megatron-LM saves as it computes. Megatron-Bridge
means to save contiguous rows, and its versions differ in which of them it turns back.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product

from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats.megatron.stated import Stated

FIELD = "moe_mlp_glu_interleave_size"
_FC1 = re.compile(r"\.mlp\.experts\..*linear_fc1\.(weight|bias)\d*$")
"""Stacked or of one expert, under torch_dist's names or the modules'."""


def run_length(said: Sequence[Stated], asked: int | None) -> int:
    """Rows of gate, and of up, that lie together; 0 where all do.

    Raises UsageError if nothing tells, or --glu-interleave says what cannot be.
    """
    stated = next((one for one in said if one.fields.get(FIELD) is not None), None)
    if stated is None:
        if asked and said:
            raise UsageError(f"{said[0].where}: states no {FIELD}, --glu-interleave is {asked}")
        return asked or 0
    found = stated.fields[FIELD]
    if type(found) is not int or found < 1:
        raise InputError(f"{stated.says(FIELD)}, expects a whole number above 0 ({stated.where})")
    if stated.fields.get("moe_grouped_gemm") is False:
        # Only grouped experts read it.
        found = 0
    if stated.dialect == "args":
        if asked not in (None, found):
            raise UsageError(f"{stated.where}: {stated.says(FIELD)}; omit --glu-interleave")
        return found
    if found and asked is None:
        raise UsageError(
            f"{stated.where}: {stated.says(FIELD)}, and versions of Megatron-Bridge differ in how "
            f"they save the rows of fc1; pass --glu-interleave {found} if they alternate by "
            f"{found}, --glu-interleave 0 if all gate rows come first (verify against the base "
            "model shows which)"
        )
    if asked not in (None, 0, found):
        raise UsageError(f"{stated.where}: {stated.says(FIELD)}, --glu-interleave is {asked}")
    return asked or 0


def contiguous(chunks: Sequence[Chunk], run: int) -> tuple[Chunk, ...]:
    """The chunks, those of fc1 cut at every run and each placed as if all gate rows came first.

    Raises InputError for runs that do not divide the rows, and for gate and up in two tensors.
    """
    if not run:
        return tuple(chunks)
    result: list[Chunk] = []
    for chunk in chunks:
        if chunk.tensor.endswith(("_w", "_v")) and ".linear_fc1." in chunk.tensor:
            raise InputError(
                f"{chunk.tensor}: gate and up apart, and interleaved by {run}: not read"
            )
        result.extend(_runs(chunk, run) if _FC1.search(chunk.tensor) else [chunk])
    return tuple(result)


def _runs(chunk: Chunk, run: int) -> Iterator[Chunk]:
    axis = len(chunk.shape) - (1 if ".linear_fc1.bias" in chunk.tensor else 2)
    inter = chunk.shape[axis] // 2
    if chunk.shape[axis] % (2 * run):
        raise InputError(f"{chunk.tensor}: {inter} rows of gate are no multiple of {run}")
    row = math.prod(chunk.extent[axis + 1 :]) * DTYPE_BYTES[chunk.dtype]
    first, count = chunk.start[axis], chunk.extent[axis]
    cuts = [first, *range((first // run + 1) * run, first + count, run), first + count]
    outer = [range(length) for length in chunk.extent[:axis]]
    for place, index in enumerate(product(*outer)):
        at = tuple(start + i for start, i in zip(chunk.start[:axis], index, strict=True))
        for low, high in pairwise(cuts):
            pair, half = divmod(low // run, 2)
            logical = half * inter + pair * run + low % run
            yield replace(
                chunk,
                start=(*at, logical, *chunk.start[axis + 1 :]),
                extent=(*(1 for _ in at), high - low, *chunk.extent[axis + 1 :]),
                offset=chunk.offset + (place * count + low - first) * row,
            )


def check_parallel(said: Sequence[Stated], run: int) -> None:
    """Refuse experts that several ranks shared: each of them interleaved its own share."""
    for one in said:
        ranks = one.raw.get("expert_tensor_parallel_size")
        if run and type(ranks) is int and ranks > 1:
            raise InputError(
                f"{one.where}: {FIELD} with expert_tensor_parallel_size {ranks}: not read"
            )

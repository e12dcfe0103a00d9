"""What resolved tensors are, and where they lie: updates, whole parameters, trained rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.adapters.resolve import Found, Held, Resolved, Tensors, axes_of
from gptoss_convert.formats.adapters.settings import MAX_RANK
from gptoss_convert.formats.adapters.tables import ONE, Target
from gptoss_convert.layouts import tables as checkpoints
from gptoss_convert.layouts.extents import Extent, extents
from gptoss_convert.layouts.folding import fold
from gptoss_convert.layouts.layout import shape_of
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table
from gptoss_convert.layouts.updates import RANK, Factor, Update

_FLOATS = frozenset(("F32", "F16", "BF16"))
Strength = Callable[[str, int], Fraction]
"""The scale of an update, for its name and the rank of its tensors; raises if they disagree."""


def updates(
    root: Path, found: Iterable[Found], sizes: Mapping[str, int], strength: Strength
) -> Iterator[Update]:
    """The updates that these tensors make; raises InputError for a rank that cannot be."""
    for one in found:
        roles = one.held
        if "rows" in roles:
            continue
        first = roles.get("b") or roles["added"]
        rank = first.rank
        for param in one.target.params:
            factors = {
                role: _factor(root, one.target, held, param, sizes) for role, held in roles.items()
            }
            if rank:
                _require_rank(root, param, factors["a"], factors["b"], rank, roles)
            yield Update(
                param,
                load_model().params[param],
                _box(param, first.bound, sizes),
                one.kind,
                rank,
                strength(one.name, rank),
                factors.get("b") or factors["added"],
                factors.get("a"),
                factors.get("magnitude"),
            )


def _box(param: str, indexes: Mapping[str, int], sizes: Mapping[str, int]):
    return tuple(
        (indexes[axis], indexes[axis] + 1) if axis in indexes else (0, sizes[axis])
        for axis in load_model().params[param]
    )


def _require_rank(
    root: Path, param: str, a: Factor, b: Factor, rank: int, roles: Mapping[str, Held]
) -> None:
    def length(factor: Factor, other: Factor) -> int:
        pairs = zip(factor.axes, factor.lengths, strict=True)
        return math.prod(n for axis, n in pairs if axis not in other.axes)

    largest = max(length(a, b), length(b, a))
    if rank > min(largest, MAX_RANK):
        raise InputError(
            f"{root}: {roles['a'].name}: rank {rank} for a matrix of {param} whose longest side "
            f"is {largest}"
        )


def _factor(root: Path, target: Target, held: Held, param: str, sizes: Mapping[str, int]) -> Factor:
    """Where a stored tensor lies, in the axes of the parameter and `rank`."""
    model = load_model()
    free = {RANK: held.rank} if RANK in held.rule.layout.axes else {}
    lengths = {**sizes, ONE: 1, **free}
    params = {one: axes_of(target, held.rule, one, model) for one in target.params}
    found = _extents(root, held, params, lengths)
    axes = params[param]
    shape = tuple(lengths[axis] if axis not in held.bound else 1 for axis in axes)
    own = tuple(extent for extent in found if extent.param == param)
    return Factor(axes, shape, own, held.name)


def _extents(
    root: Path,
    held: Held,
    params: Mapping[str, tuple[str, ...]],
    lengths: Mapping[str, int],
) -> list[Extent]:
    rule = held.rule
    shape, placements = shape_of(rule.layout, params, lengths, rule.named)
    as_rule = checkpoints.Rule(held.name, tuple(params), rule.layout, (), rule.at, False)
    dtype = held.chunks[0].dtype
    if dtype not in _FLOATS:
        raise InputError(
            f"{root}: {held.name}: dtype {dtype}; expects {', '.join(sorted(_FLOATS))}"
        )
    tensor = checkpoints.Tensor(held.name, as_rule, dtype, shape, (), placements, held.bound)
    return extents(str(root), [tensor], held.chunks, root=root)


def replaced(
    root: Path, resolved: Resolved, tensors: Tensors, sizes: Mapping[str, int]
) -> Iterator[Extent]:
    """The parameters that the file holds whole, as extents of its own files."""
    by_name = {tensor.name: tensor for tensor in load_table("hf").tensors("bf16", sizes)}
    if len(set(resolved.whole.values())) < len(resolved.whole):
        raise InputError(f"{root}: a tensor is stored twice: {fold(resolved.whole)}")
    for name, plain in resolved.whole.items():
        chunks = [replace(chunk, tensor=plain) for chunk in tensors[name]]
        yield from extents(str(root), [by_name[plain]], chunks, _FLOATS, root)


def rows(
    root: Path,
    found: Iterable[Found],
    tokens: Mapping[str, Sequence[int]],
    sizes: Mapping[str, int],
) -> Iterator[Extent]:
    """The rows that trained tokens replace, as extents."""
    for one in found:
        if "rows" not in one.held:
            continue
        held = one.held["rows"]
        module = one.name.rpartition(".")[2]
        indexes = tokens.get(module, ())
        shape = held.chunks[0].shape
        if len(indexes) != shape[0]:
            raise IntegrityError(
                f"{root}: {held.name}: {shape[0]} rows, trainable_token_indices names "
                f"{len(indexes)} for {module}"
            )
        if indexes and max(indexes) >= sizes["vocab"]:
            raise InputError(
                f"{root}: trainable_token_indices: {max(indexes)}: the base has {sizes['vocab']} "
                "rows"
            )
        yield from _row_extents(root, held, one.target.params[0], indexes)


def _row_extents(root: Path, held: Held, param: str, indexes: Sequence[int]) -> Iterator[Extent]:
    (chunk,) = held.chunks
    step = chunk.nbytes // chunk.shape[0]
    item = step // chunk.shape[1]
    for place, index in enumerate(indexes):
        box = ((index, index + 1), (0, chunk.shape[1]))
        origin = chunk.offset + (place - index) * step
        yield Extent(
            param,
            box,
            FileRef(root, chunk.file, chunk.identity),
            origin,
            (step, item),
            chunk.dtype,
            held.name,
        )

"""Tensors as `torch.save` pickles them: plain, as parameters, and as one rank's part of a whole.

The closed list of what stands for a tensor. Sources: torch/_utils.py and torch/_tensor.py
(`_rebuild_*`), torch/distributed/tensor/_api.py and placement_types.py (DTensor),
torch/distributed/_shard/sharded_tensor/api.py (ShardedTensor).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from gptoss_convert.containers.torch_dist.items import TensorRecord, describe_tensor
from gptoss_convert.containers.torch_dist.pickle_state import Construct, Record
from gptoss_convert.errors import InputError, IntegrityError

_PARAMETERS = frozenset(
    ("torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state")
)
_TYPED = "torch._tensor._rebuild_from_type_v2"
_WRAPPED = "torch._utils._rebuild_wrapper_subclass"
_PLAIN = frozenset(("torch.Tensor", "torch.nn.parameter.Parameter", "torch.nn.parameter.Buffer"))
_DTENSOR = frozenset(
    (
        "torch.distributed.tensor.DTensor",
        "torch.distributed.tensor._api.DTensor",
        "torch.distributed._tensor.api.DTensor",
    )
)
_SHARDED = "torch.distributed._shard.sharded_tensor.api.ShardedTensor"
_DISTRIBUTED = "torch.distributed."


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor, or the box of it that one rank saved."""

    shape: tuple[int, ...]
    """Of the whole tensor."""
    start: tuple[int, ...]
    extent: tuple[int, ...]
    record: TensorRecord
    """The data of the box."""


def is_tensor(value: object) -> bool:
    """Whether a value stands for a tensor of any kind, those that are not read included."""
    return isinstance(value, Record) and (
        value.name in {"tensor", _TYPED, *_PARAMETERS}
        or value.name.startswith(("torch._utils._rebuild_", "torch._tensor._rebuild_"))
    )


def pieces(value: object, where: str) -> Iterator[Piece]:
    """The parts of one tensor that a pickle holds: one, none or several for a ShardedTensor.

    Raises InputError that names the class of a tensor that is of another kind.
    """
    if isinstance(value, Record):
        args = value.args
        if value.name in _PARAMETERS and args:
            yield from pieces(args[0], where)
            return
        if value.name == _TYPED and len(args) == 4 and isinstance(args[2], tuple):
            yield from _typed(args[0], args[1], args[2], args[3], where)
            return
    yield _whole(value, where)


def _whole(value: object, where: str) -> Piece:
    if isinstance(value, Record) and value.name != "tensor":
        raise InputError(f"{where}: built by {value.name}; only plain tensors are read")
    record = describe_tensor(value, where)
    return Piece(record.shape, (0,) * len(record.shape), record.shape, record)


def _typed(
    build: object, kind: object, args: tuple[object, ...], state: object, where: str
) -> Iterator[Piece]:
    """A tensor of a class of its own: those of distributed training, and none that computes."""
    built, of = _named(build), _named(kind)
    if built == "tensor" and of in _PLAIN:
        yield _whole(Record("tensor", args), where)
    elif built == _WRAPPED and of in _DTENSOR:
        yield _dtensor(args, _attributes(state), where)
    elif built == _WRAPPED and of == _SHARDED:
        yield from _sharded(state, where)
    else:
        raise InputError(
            f"{where}: a {of} (built by {built}); only plain tensors, DTensor and ShardedTensor "
            "are read"
        )


def _named(value: object) -> str:
    return value.name if isinstance(value, Construct | Record) else str(value)[:200]


def _attributes(state: object) -> dict[object, object]:
    """Of a state, which is a dict, or a tuple of one and another for slots."""
    parts = state if isinstance(state, tuple) else (state,)
    found: dict[object, object] = {}
    for part in parts:
        if isinstance(part, dict):
            found |= part
    return found


def _kind(value: object) -> str:
    """The class of a record of torch.distributed, "" for anything else."""
    name = value.name if isinstance(value, Record) else ""
    return name.rpartition(".")[2] if name.startswith(_DISTRIBUTED) else ""


def _counts(value: object, where: str) -> tuple[int, ...]:
    """A shape, an index or the like."""
    items = (value,) if type(value) is int else value
    if isinstance(items, tuple | list):
        numbers = tuple(item for item in items if type(item) is int and 0 <= item < 1 << 48)
        if len(numbers) == len(items):
            return numbers
    raise InputError(f"{where}: a shape or an index is no tuple of natural numbers")


def _dtensor(args: tuple[object, ...], state: dict[object, object], where: str) -> Piece:
    """One rank's part of a DTensor: where it lies follows from the placements and the mesh."""
    shape = _counts(args[2] if len(args) > 2 else None, where)
    spec = state.get("_spec")
    if _kind(spec) != "DTensorSpec":
        raise InputError(f"{where}: a DTensor without its DTensorSpec")
    assert isinstance(spec, Record)
    said = _attributes(spec.state)
    placements = said.get("placements")
    if not isinstance(placements, tuple | list):
        raise InputError(f"{where}: a DTensor without placements")
    sizes, coordinates = _mesh(said.get("mesh"), len(placements), where)
    start, extent = [0] * len(shape), [*shape]
    for axis, dim in _order(placements, said.get("shard_order"), len(shape), where):
        strided = _kind(placements[axis]) == "_StridedShard"
        parts, mine = sizes[axis], coordinates[axis]
        if strided and extent[dim] % parts:
            raise InputError(f"{where}: {extent[dim]} rows in {parts} strided parts: not read")
        each = -(-extent[dim] // parts)
        low = min(mine * each, extent[dim])
        start[dim] += low
        extent[dim] = min(each, extent[dim] - low)
    record = describe_tensor(state.get("_local_tensor"), where)
    if not math.prod(extent) and not math.prod(record.shape):
        # A rank without rows may hold a tensor of other axes: there is nothing of it.
        record = replace(record, shape=tuple(extent))
    return Piece(shape, tuple(start), tuple(extent), record)


def _mesh(value: object, axes: int, where: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(lengths of the mesh's axes, this rank's place on each); before torch 2.10 the mesh is a
    tensor."""
    if _kind(value) != "DeviceMesh":
        raise InputError(f"{where}: a DTensor without its DeviceMesh")
    assert isinstance(value, Record)
    said = _attributes(value.state)
    layout = said.get("_layout")
    if _kind(layout) == "_MeshLayout":
        assert isinstance(layout, Record)
        flat = _attributes(layout.state).get("axes", ())
        if not isinstance(flat, tuple | list):
            raise InputError(f"{where}: a DeviceMesh without axes")
        sizes = tuple(
            math.prod(_counts(_attributes(one.state).get("shape"), where))
            for one in flat
            if isinstance(one, Record)
        )
    else:
        sizes = describe_tensor(said.get("mesh"), where).shape
    coordinates = _counts(said.get("_coordinate_on_dim"), where)
    pairs = [*zip(sizes, coordinates, strict=False)]
    if not len(sizes) == len(coordinates) == axes or any(at >= size for size, at in pairs):
        raise IntegrityError(f"{where}: rank at {coordinates} of a mesh {sizes}, {axes} placements")
    return sizes, coordinates


def _order(
    placements: Sequence[object], stated: object, rank: int, where: str
) -> list[tuple[int, int]]:
    """(axis of the mesh, dimension) in the order in which a tensor is cut.

    As stated, which torch does since 2.10; before, strided cuts come after those of later axes.
    """
    cut: dict[int, int] = {}
    for axis, one in enumerate(placements):
        kind = _kind(one)
        if kind == "Replicate":
            continue
        if kind not in {"Shard", "_StridedShard"}:
            raise InputError(f"{where}: placed as {kind or one!r:.80}; read: Shard and Replicate")
        assert isinstance(one, Record)
        (dim,) = _counts(_attributes(one.state).get("dim"), where)
        if dim >= rank:
            raise IntegrityError(f"{where}: cut along dimension {dim} of {rank}")
        cut[axis] = dim
    order = [*_stated(stated)]
    if sorted(order) != sorted(cut.items()):
        strided = [axis for axis in cut if _kind(placements[axis]) == "_StridedShard"]
        plain = [axis for axis in cut if axis not in strided]
        order = [(axis, cut[axis]) for axis in (*plain, *reversed(strided))]
    return order


def _stated(entries: object) -> Iterator[tuple[int, int]]:
    """`shard_order`: a dimension, and the axes of the mesh that cut it, one after the other."""
    for entry in entries if isinstance(entries, tuple | list) else ():
        args = entry.args if isinstance(entry, Record) else ()
        if len(args) == 2 and type(args[0]) is int and isinstance(args[1], tuple):
            for axis in args[1]:
                if type(axis) is int:
                    yield axis, args[0]


def _sharded(state: object, where: str) -> Iterator[Piece]:
    """The shards of a ShardedTensor that this rank holds; each says where it lies."""
    shards, metadata = (*state, None, None)[:2] if isinstance(state, tuple) else (None, None)
    if not isinstance(shards, list) or _kind(metadata) != "ShardedTensorMetadata":
        raise InputError(f"{where}: a ShardedTensor without shards or metadata")
    assert isinstance(metadata, Record)
    shape = _counts(_attributes(metadata.state).get("size"), where)
    for shard in shards:
        said = _attributes(shard.state) if isinstance(shard, Record) else {}
        placed = said.get("metadata")
        if _kind(placed) != "ShardMetadata":
            raise InputError(f"{where}: a shard without its metadata")
        assert isinstance(placed, Record)
        where_it_lies = _attributes(placed.state)
        start = _counts(where_it_lies.get("shard_offsets"), where)
        extent = _counts(where_it_lies.get("shard_sizes"), where)
        if not len(start) == len(extent) == len(shape):
            raise IntegrityError(f"{where}: shard {start} + {extent} of a tensor {shape}")
        yield Piece(shape, start, extent, describe_tensor(said.get("tensor"), where))

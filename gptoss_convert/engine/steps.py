"""Plans: how each box of each parameter gets from the source's files to the target's."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product

from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.engine.derivations import Change, Recipe, choose
from gptoss_convert.errors import IntegrityError
from gptoss_convert.layouts.extents import Extent, disjoint, overlap, volume
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import Family, Model

PAGE = 4096
TILE_BYTES = 32 << 20
"""Largest tile of an expert weight as BF16: one expert's gate_up of the released models fits."""
_STEP_BYTES = 8_700
"""Memory of one step's plan and of what is found out about it; most for Megatron's files."""
_CAST_BYTES = 2 << 20
"""Memory of a cast besides what it reads and makes."""
_PLAIN_TILE_BYTES = 8 << 20
"""Largest tile of any other weight: long enough runs for the disk, small buffers."""
PIECE_BYTES = 16 << 20
"""About what is computed and written of a tile at once: little memory, and few calls, since many
threads wait for the interpreter's lock at each."""
_ROWS = 32
"""Pieces are cut between so many rows: at the released models' lengths, that is between pages."""


@dataclass(frozen=True, slots=True)
class Step:
    """One box of one weight: the extents that hold it in the source and take it in the target."""

    recipe: Recipe
    lengths: tuple[int, ...]
    """Of the weight's axes, slowest first."""
    box: Box
    sources: tuple[Extent, ...]
    targets: tuple[Extent, ...]

    @property
    def family(self) -> Family:
        """The weight and all that may hold it."""
        return self.recipe.family

    @property
    def layer_axis(self) -> int:
        """The position of the layer among the weight's axes, -1 without one."""
        return self.family.axes.index("layer") if "layer" in self.family.axes else -1

    @property
    def layer(self) -> int:
        """The layer that the step belongs to, 0 for parameters of no layer."""
        return self.box[self.layer_axis][0] if self.layer_axis >= 0 else 0

    def part(self, box: Box) -> Step:
        """The step for a part of its box."""
        return replace(self, box=box)

    def box_of(self, param: str) -> Box:
        """The step's box in the axes of a parameter that its recipe knows."""
        return self.recipe.boxes[param](self.box)

    def parts(self, extents: Iterable[Extent]) -> Iterator[tuple[Extent, Box]]:
        """The extents, in their order, that hold a part of the step's box, and that part."""
        boxes: dict[str, Box] = {}
        for extent in extents:
            box = boxes.get(extent.param)
            if box is None:
                boxes[extent.param] = box = self.box_of(extent.param)
            if part := overlap(extent.box, box):
                yield extent, part

    def moved_bytes(self) -> int:
        """Bytes that the step reads and writes."""
        return _payload(self, self.sources) + _payload(self, self.targets)

    def source_bytes(self) -> int:
        """Bytes of memory that the source parts need, page phases included, and what is made of
        those that are cast."""
        cast = (e for e in self.sources if e.param == self.family.weight)
        floats = [e for e in cast if e.dtype != self.family.dtype]
        made = sum(2 * volume(box) for _, box in self.parts(floats))
        return _span(self, self.sources) + made + (_CAST_BYTES if floats else 0)

    def target_bytes(self) -> int:
        """The same of the target parts, all at once."""
        return _span(self, self.targets)

    def scratch_bytes(self) -> int:
        """Bytes of buffer for values that are made on the way."""
        return 2 * volume(self.box) + PAGE if self.recipe.scratch else 0

    def buffer_bytes(self) -> int:
        """Bytes of buffer that a conversion needs: the target's weight is made piece by piece."""
        weight, beside = self.split_targets()
        largest = next(self.pieces())  # This program's own files are cut evenly.
        made = _span(self, beside) + _span(largest, weight) + self.scratch_bytes()
        return self.source_bytes() + made

    def split_targets(self) -> tuple[tuple[Extent, ...], tuple[Extent, ...]]:
        """The target's extents of the weight itself, and the others."""
        weight = self.family.weight
        return (
            tuple(extent for extent in self.targets if extent.param == weight),
            tuple(extent for extent in self.targets if extent.param != weight),
        )

    def pieces(self) -> Iterator[Step]:
        """The step for parts of the weight that follow one another in every extent of the target.

        Blocks are never cut, and pages are not if the rows are of the released models' lengths.
        """
        weight, _ = self.split_targets()
        for box in _pieces(self.box, weight, math.lcm(_ROWS, self.family.block)):
            yield self.part(box)


@dataclass(frozen=True)
class Plan:
    """All steps of a conversion, in the order of the target's bytes."""

    steps: tuple[Step, ...]
    read_bytes: int
    write_bytes: int
    buffer_bytes: int
    """Bytes of buffer that one worker needs for the largest step."""

    @property
    def own_bytes(self) -> int:
        """Bytes of memory that the plan itself takes, and what its execution finds out."""
        return _STEP_BYTES * len(self.steps)


def make_plan(
    model: Model,
    sizes: Mapping[str, int],
    sources: Sequence[Extent],
    targets: Sequence[Extent],
    tile_bytes: int = TILE_BYTES,
    partial: bool = False,
    changes: Mapping[str, Sequence[Change]] | None = None,
) -> Plan:
    """Join source and target extents, parameter by parameter; `partial` allows layers without any.

    `changes` are made on the way, by weight. Checks that every element a step needs lies in the
    source exactly once and that every target element is written exactly once; raises
    IntegrityError that names the parameter and the box.
    """
    source_of, target_of = _by_param(sources), _by_param(targets)
    steps: list[Step] = []
    for family in model.families.values():
        wanted = [member for member in family.members if member in target_of]
        if not wanted:
            continue
        recipe = choose(family, source_of, wanted, (changes or {}).get(family.weight, ()))
        held = [extent for param in recipe.needs for extent in source_of[param]]
        taken = [extent for param in recipe.makes for extent in target_of[param]]
        steps.extend(_family_steps(recipe, sizes, held, taken, tile_bytes, partial))
    order = {file: i for i, file in enumerate(dict.fromkeys(e.file for e in targets))}
    steps.sort(key=lambda step: _position(step, order))
    return Plan(tuple(steps), *_totals(steps))


def _family_steps(
    recipe: Recipe,
    sizes: Mapping[str, int],
    sources: Sequence[Extent],
    targets: Sequence[Extent],
    tile_bytes: int,
    partial: bool,
) -> Iterator[Step]:
    family = recipe.family
    lengths = tuple(sizes[axis] for axis in family.axes)
    if not family.encodings:
        tile_bytes = min(tile_bytes, _PLAIN_TILE_BYTES)
    tile = _tile(family, lengths, (sources[0], targets[0]), tile_bytes)
    source_cells = _cells(recipe, lengths, tile, sources)
    target_cells = _cells(recipe, lengths, tile, targets)
    for index in product(*(range(-(-n // t)) for n, t in zip(lengths, tile, strict=True))):
        if partial and index not in source_cells and index not in target_cells:
            continue
        box = tuple(
            (i * t, min(i * t + t, n)) for i, t, n in zip(index, tile, lengths, strict=True)
        )
        step = Step(recipe, lengths, box, tuple(source_cells[index]), tuple(target_cells[index]))
        _check_cover("source", step, step.sources, recipe.needs)
        _check_cover("target", step, step.targets, recipe.makes)
        yield step


def _tile(
    family: Family, lengths: Sequence[int], sides: tuple[Extent, Extent], tile_bytes: int
) -> list[int]:
    """The longest box of one layer that fits, cut along the target's slowest axes.

    What lies between its parts on either side counts too, as buffers hold it. Blocks are never cut.
    """
    tile = [1 if axis == "layer" else n for axis, n in zip(family.axes, lengths, strict=True)]
    _, target = sides
    # An axis of stride 0 is bound by the tensor's name: no tensor holds two of its indexes.
    slowest = sorted(range(len(tile) - 1), key=lambda i: -(target.strides[i] or math.inf))
    for axis in slowest:
        payload = 2 * math.prod(tile) // tile[axis]
        unit = max(payload, *(side.strides[axis] for side in sides))
        if unit >= tile_bytes or target.strides[axis] == 0:
            tile[axis] = 1
        elif unit * tile[axis] > tile_bytes:
            tile[axis] = tile_bytes // unit
    return tile


def _cells(
    recipe: Recipe, lengths: Sequence[int], tile: Sequence[int], extents: Iterable[Extent]
) -> dict[tuple[int, ...], list[Extent]]:
    """The extents that reach into each cell of the grid of tiles."""
    cells: dict[tuple[int, ...], list[Extent]] = defaultdict(list)
    everywhere = [range(-(-n // t)) for n, t in zip(lengths, tile, strict=True)]
    for extent in extents:
        spans = everywhere.copy()
        for axis in range(recipe.rows[extent.param]):
            lo, hi = extent.box[axis]
            spans[axis] = range(lo // tile[axis], -(-hi // tile[axis]))
        for index in product(*spans):
            cells[index].append(extent)
    return cells


def _check_cover(side: str, step: Step, extents: Sequence[Extent], params: Iterable[str]) -> None:
    found: dict[tuple[str, bool], list[Box]] = defaultdict(list)
    for extent, part in step.parts(extents):
        found[extent.param, extent.alias].append(part)
    for param in params:
        whole = step.box_of(param)
        for alias in {extent.alias for extent in extents}:
            parts = found[param, alias]
            if parts == [whole] or (alias and not parts):
                continue
            twice = not disjoint(parts)
            if twice or sum(map(volume, parts)) != volume(whole):
                raise IntegrityError(
                    f"{side}: {param}{list(whole)}: "
                    + ("stored more than once" if twice else "not stored completely")
                )
        if not extents:
            raise IntegrityError(f"{side}: {param}{list(whole)}: not stored")


def _by_param(extents: Iterable[Extent]) -> dict[str, list[Extent]]:
    grouped: dict[str, list[Extent]] = defaultdict(list)
    for extent in extents:
        grouped[extent.param].append(extent)
    return grouped


def _position(step: Step, order: Mapping[FileRef, int]) -> tuple[int, int]:
    extent = step.targets[0]
    box = step.box_of(extent.param)
    return order[extent.file], extent.at(overlap(extent.box, box) or box)


def _pieces(box: Box, extents: Sequence[Extent], unit: int) -> Iterator[Box]:
    slowest = {_slowest(extent, box) for extent in extents}
    count = -(-2 * volume(box) // PIECE_BYTES)
    if len(slowest) != 1 or count < 2:
        yield box
        return
    (axis,) = slowest
    lo, hi = box[axis]
    blocks = axis == len(box) - 1
    length = max(1, (hi - lo) // count)
    if blocks or length > unit:
        length = -(-length // unit) * unit
    for start in range(lo, hi, length):
        part = (*box[:axis], (start, min(start + length, hi)), *box[axis + 1 :])
        if length > 1 or blocks:
            yield part
        else:
            yield from _pieces(part, extents, unit)


def _slowest(extent: Extent, box: Box) -> int:
    """The slowest axis of the extent's part of a box, of those longer than 1 if there are any."""
    part = overlap(extent.box, box) or box
    return max(
        range(len(part)), key=lambda axis: (part[axis][1] - part[axis][0] > 1, extent.strides[axis])
    )


def _span(step: Step, extents: Sequence[Extent]) -> int:
    return sum(extent.span(part) + 2 * PAGE for extent, part in step.parts(extents))


def _totals(steps: Sequence[Step]) -> tuple[int, int, int]:
    """(bytes to read, bytes to write, largest buffer of a conversion)."""
    read = sum(_payload(step, step.sources) for step in steps)
    written = sum(_payload(step, step.targets) for step in steps)
    return read, written, max((step.buffer_bytes() for step in steps), default=0)


def _payload(step: Step, extents: Sequence[Extent]) -> int:
    parts = step.parts(extents)
    return sum(volume(box) * DTYPE_BYTES[extent.dtype] for extent, box in parts)

"""The normal form of an adapter: updates of the model's parameters, and what replaces them."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from gptoss_convert.containers.paths import open_file
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.errors import InputError
from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
from gptoss_convert.layouts.extents import Extent, overlap
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.updates import Update

_PIECE = 8 << 20


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk, of any dialect: headers read and checked, no value touched."""

    root: Path
    dialect: str
    written_by: str
    base_model: str | None
    """What it says it was trained on: a hint, no proof."""
    updates: tuple[Update, ...]
    replaced: tuple[Extent, ...]
    """Boxes of parameters that the adapter holds whole: they take the place of the base's."""
    base_copies: tuple[str, ...]
    """Tensors that the adapter holds as the base had them: evidence of the right base."""
    files: tuple[FileRef, ...]
    """All that decides what it is, in a fixed order."""
    options: AdapterOptions
    """How it was opened."""
    notes: tuple[str, ...] = ()
    details: Mapping[str, Any] = field(default_factory=dict)
    """What only people want to know of it."""
    repository: str | None = None
    """Where it was downloaded from, its commit included."""

    @property
    def place(self) -> str:
        """Where it is, for people and for whoever wants the same again."""
        return self.repository or str(self.root)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The parameters that it changes, in model order."""
        changed = {one.param for one in (*self.updates, *self.replaced)}
        return tuple(param for param in load_model().families if param in changed)

    @property
    def changes_experts(self) -> bool:
        """Whether it changes a weight that MXFP4 can encode."""
        families = load_model().families
        return any(families[param].encodings for param in self.parameters)

    def over(self, base: Sequence[Extent]) -> list[Extent]:
        """The base's extents, with the adapter's in place of those that it holds whole.

        Raises InputError where some layers of an encoded weight would be plain.
        """
        by_param: dict[str, list[Extent]] = defaultdict(list)
        for extent in self.replaced:
            by_param[extent.param].append(extent)
        gone = {param for weight in by_param for param in self._encoded(weight, base)}
        left = (extent for extent in base if extent.param not in gone)
        kept = [part for extent in left for part in _without(extent, by_param[extent.param])]
        return [*kept, *self.replaced]

    def _encoded(self, weight: str, base: Sequence[Extent]) -> frozenset[str]:
        """The parameters that hold a weight encoded, if the base holds it so."""
        held = {extent.param for extent in base}
        stored = load_model().families[weight].stored(held)
        if stored is None or weight in held:
            return frozenset()
        mine = {e.box[0] for e in self.replaced if e.param == weight}
        if mine != {e.box[0] for e in base if e.param in stored.params}:
            raise InputError(
                f"{self.root}: holds {weight} of some layers whole, the base has it in MXFP4: "
                "convert the base to BF16 first"
            )
        return frozenset(stored.params)

    def digest(self) -> str:
        """SHA-256 of its files, name by name, in hexadecimal digits."""
        total = hashlib.sha256()
        for file in self.files:
            with open_file(file) as opened:
                total.update(f"{file.name}\n{os.fstat(opened.fileno()).st_size}\n".encode())
                while piece := opened.read(_PIECE):
                    total.update(piece)
        return total.hexdigest()

    def summary(self) -> dict[str, Any]:
        """What people and programs want to know of it, as plain data."""
        return {
            "path": self.place,
            "dialect": self.dialect,
            "written_by": self.written_by,
            "base_model": self.base_model,
            "parameters": list(self.parameters),
            **self.details,
            "scale": self.options.adapter_scale,
            "arithmetic": self.options.adapter_arithmetic,
        }

    def record(self) -> dict[str, Any]:
        """The same with its digest, for whoever wants to know later what was merged."""
        return self.summary() | {"sha256": self.digest()}

    def scaled(self, by: Fraction) -> Adapter:
        """The same adapter, its updates so many times as strong."""
        updates = tuple(replace(one, scale=one.scale * by) for one in self.updates)
        return replace(self, updates=updates)


def _without(extent: Extent, gone: Sequence[Extent]) -> Iterator[Extent]:
    """The parts of an extent outside the boxes of others, which share no element."""
    left = [extent.box]
    for other in sorted(gone, key=lambda one: one.box):
        # In this order only the last part can still reach into the next box.
        left[-1:] = _difference(left[-1], other.box) if left else []
    yield from (replace(extent, box=box) for box in left)


def _difference(box: Box, other: Box) -> list[Box]:
    """A box without what it shares with another; what lies behind that on the first axis last."""
    common = overlap(box, other)
    if common is None:
        return [box]
    parts: list[Box] = []
    for axis in reversed(range(len(box))):
        (lo, hi), (first, last) = box[axis], common[axis]
        head, tail = common[:axis], box[axis + 1 :]
        # Axes before this one have the common range, those after it the whole one.
        sides = ((lo, first), (last, hi))
        parts += [(*head, side, *tail) for side in sides if side[0] < side[1]]
    return parts

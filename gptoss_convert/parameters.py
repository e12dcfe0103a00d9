"""A checkpoint of any format as one read-only mapping of parameters, read as they are asked for.

>>> with gptoss_convert.open("gpt-oss-20b") as checkpoint:
...     checkpoint["gate_up.weight"][3, 5]  # layer 3, expert 5: a tensor (inter, glu, hidden)
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.containers import DTYPE_BYTES
from gptoss_convert.containers.refs import FileRef
from gptoss_convert.engine.buffers import Part, StepReader, array_type
from gptoss_convert.engine.changes import merges_of
from gptoss_convert.engine.derivations import Change, choose
from gptoss_convert.engine.steps import TILE_BYTES, Step
from gptoss_convert.engine.work import Work
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
from gptoss_convert.formats.checkpoint import DEFAULT, Checkpoint, Choices, casts
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.hub.adapters import with_adapter
from gptoss_convert.layouts.extents import Extent, overlap, volume
from gptoss_convert.layouts.indexing import Index, resolved
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.model import Family, load_model
from gptoss_convert.layouts.updates import Update
from gptoss_convert.machine.arena import Arena
from gptoss_convert.machine.failures import absent
from gptoss_convert.machine.files import SourceFiles

if TYPE_CHECKING:
    from torch import Tensor


def open(
    path: str | Path,
    choices: Choices = DEFAULT,
    *,
    cast: bool = False,
    adapter: str | Path | AdapterOptions | None = None,
) -> Parameters:
    """Open the checkpoint in `path`, of any format; headers are read and checked, no weight is.

    `cast` rounds tensors that are stored as float32 or float16; they are refused otherwise. An
    `adapter`, a LoRA's directory or repository, is merged into whatever is read.
    """
    given = isinstance(adapter, AdapterOptions)
    options = adapter if given else AdapterOptions(adapter and str(adapter))
    checkpoint = with_adapter(
        open_checkpoint(Path(path), choices), options, follow_links=choices.follow_links
    )
    return Parameters(checkpoint, checkpoint.extents(casts(cast)))


class Parameters(Mapping[str, "Parameter"]):
    """The parameters of a checkpoint by their names in `model.toml`, in model order.

    An MXFP4 weight stands there decoded, and its blocks and scales beside it under names of their
    own. Files are opened when first read, and closed with the context or with the last reference.
    """

    def __init__(self, checkpoint: Checkpoint, extents: Sequence[Extent]) -> None:
        self.checkpoint = checkpoint
        self._files = _Files()
        sizes = load_model().sizes(checkpoint.config.numbers)
        changes = merges_of(*checkpoint.updates).by_weight
        updates: dict[str, list[Update]] = defaultdict(list)
        for update in checkpoint.updates[0]:
            updates[update.param].append(update)
        self._parameters = {
            family.weight: Parameter(
                family.weight,
                family.axes,
                tuple(sizes[axis] for axis in family.axes),
                tuple(held),
                family,
                self._files,
                tuple(changes.get(family.weight, ())),
                frozenset(axis for one in updates[family.weight] for axis in one.whole_axes),
            )
            for family, held in _held(extents, changes)
        }

    def __getitem__(self, name: str) -> Parameter:
        try:
            return self._parameters[name]
        except KeyError:
            raise KeyError(self._unknown(name)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def __repr__(self) -> str:
        titles = ("parameter", "axes", "shape", "dtype", "stored as", "stored bytes")
        rows = [
            (p.name, " ".join(p.axes), _times(p.shape), p.dtype, p.stored_as, f"{p.stored_bytes:,}")
            for p in self.values()
        ]
        widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
        lines = [
            "  ".join(map(str.ljust, row[:-1], widths)) + "  " + row[-1].rjust(widths[-1])
            for row in (titles, *rows)
        ]
        model = f"{self.checkpoint.label}, gpt-oss {self.checkpoint.config.size}"
        return "\n".join((f"{self.checkpoint.root}: {model}", *lines))

    def close(self) -> None:
        """Close the files: nothing can be read any more."""
        self._files.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        self.close()

    def _unknown(self, name: str) -> str:
        if name in load_model().params:
            return f"{name}: {self.checkpoint.root} stores its experts as BF16, it has no {name}"
        near = get_close_matches(name, self._parameters, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(self._parameters)}"
        return f"{name}: no such parameter; {hint}"


@dataclass(frozen=True, repr=False, eq=False)
class Parameter:
    """One parameter of an open checkpoint: an index reads that part of it and returns a tensor.

    `parameter[layer, expert]`, slices and `...` as in numpy, `parameter[...]` for all of it. Only
    that part is read; where it lies in pieces, gaps of up to a page between them come along, or
    all gaps if they hold less than the pieces. BF16 values come as `torch.bfloat16`, MXFP4 decoded
    exactly; blocks and scales as `torch.uint8`.
    """

    name: str
    axes: tuple[str, ...]
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    """Where it lies: its own boxes, or those of the blocks and scales it is decoded from."""
    family: Family
    _files: _Files
    _changes: tuple[Change, ...] = ()
    """What is merged into it."""
    _whole: frozenset[str] = frozenset()
    """The axes along which that needs all at once."""

    @property
    def dtype(self) -> str:
        """`BF16`, or `U8` for blocks and scales."""
        return load_model().dtype(self.name)

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]

    @property
    def stored_as(self) -> str:
        """`MXFP4` if it is decoded, else the dtype in the files: `BF16`, `U8`, `F32`, `F16`."""
        if encoding := self.family.stored({extent.param for extent in self.extents}):
            return encoding.codec.name.upper()
        return ", ".join(sorted({extent.dtype for extent in self.extents}))

    @property
    def stored_bytes(self) -> int:
        """Bytes that hold it in the checkpoint's files."""
        return sum(volume(extent.box) * DTYPE_BYTES[extent.dtype] for extent in self.extents)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of the checkpoint's tensors that hold it."""
        return tuple(dict.fromkeys(extent.tensor for extent in self.extents))

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that hold it."""
        return tuple(sorted({file.path for extent in self.extents for file in extent.files}))

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Index) -> Tensor:
        torch = _torch()
        box, picked = resolved(self.name, self.axes, self.shape, index)
        tensor = torch.from_numpy(self._read(box))[picked]
        return tensor.view(torch.bfloat16) if self.dtype == "BF16" else tensor

    def __repr__(self) -> str:
        sizes = " ".join(f"{axis}={n}" for axis, n in zip(self.axes, self.shape, strict=True))
        first, *others = self.files
        where = f"{first.name} and {len(others)} more files" if others else first.name
        return (
            f"{self.name}: {sizes}; {self.dtype}, {self.nbytes:,} bytes; "
            f"stored as {self.stored_as}, {self.stored_bytes:,} bytes, in {where}"
        )

    def _read(self, box: Box) -> NDArray[Any]:
        """The elements of `box`; BF16 as its bits."""
        asked, box = box, self._whole_rows(box)
        values = np.empty([hi - lo for lo, hi in box], array_type(self.dtype))
        reader = StepReader(self._files, 0)
        whole = Part(self.extents[0], box, -1, values)
        stored: dict[str, list[Extent]] = defaultdict(list)
        for extent in self.extents:
            stored[extent.param].append(extent)
        recipe = choose(self.family, stored, [self.name], self._changes)
        for tile, held in _tiles(self.family, box, self.extents) if values.size else ():
            step = Step(recipe, self.shape, tile, tuple(held), ())
            reader.begin(step.source_bytes())
            parts, _ = reader.read(step, held)
            place = Part(held[0], tile, -1, whole.view(tile))
            Work(step, parts, {self.name: [place]}).run((*recipe.first, *recipe.by_piece))
        self._files.require_unchanged()
        return whole.view(asked)

    def _whole_rows(self, box: Box) -> Box:
        """The box, with all of the axes along which a change needs whole rows."""
        spans = zip(self.axes, self.shape, box, strict=True)
        return tuple((0, length) if axis in self._whole else span for axis, length, span in spans)


def _tiles(
    family: Family, box: Box, extents: Sequence[Extent]
) -> Iterator[tuple[Box, Sequence[Extent]]]:
    """Boxes of bounded size, each with the extents that reach into it; rows are never cut."""
    held = [e for e in extents if overlap(e.box, family.box(e.param, box))]
    axis = next((axis for axis, (lo, hi) in enumerate(box[:-1]) if hi - lo > 1), None)
    if 2 * volume(box) <= TILE_BYTES or axis is None:
        yield box, held
        return
    lo, hi = box[axis]
    middle = (lo + hi) // 2
    for half in ((lo, middle), (middle, hi)):
        yield from _tiles(family, (*box[:axis], half, *box[axis + 1 :]), held)


def _held(
    extents: Sequence[Extent], changed: Container[str]
) -> Iterator[tuple[Family, Sequence[Extent]]]:
    """Each parameter, as a family, with the extents it is read from; of a weight that is changed,
    there are no encoded members."""
    held: dict[str, list[Extent]] = defaultdict(list)
    for extent in extents:
        held[extent.param].append(extent)
    model = load_model()
    for family in model.families.values():
        stored = family.stored(held)
        params = (family.weight,) if stored is None else stored.params
        yield family, [extent for param in params for extent in held[param]]
        for param in family.members[1:]:
            if param in held and family.weight not in changed:
                yield Family(param, model.params[param], dtype=model.dtype(param)), held[param]


def _times(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))


class _Files:
    """The files of an open checkpoint, until they are closed or nothing refers to them."""

    def __init__(self) -> None:
        self._files = SourceFiles()
        self._finalizer = weakref.finalize(self, self._files.__exit__, None, None, None)

    def read(self, file: FileRef, offset: int, nbytes: int, arena: Arena, position: int) -> None:
        if not self._finalizer.alive:
            raise UsageError(f"{file}: the checkpoint was closed")
        self._files.read(file, offset, nbytes, arena, position)

    def require_unchanged(self) -> None:
        self._files.require_unchanged()

    def close(self) -> None:
        self._finalizer()


def _torch() -> ModuleType:
    try:
        import torch
    except ImportError as error:
        raise absent("tensors need torch (pip install torch)", error) from None
    return torch

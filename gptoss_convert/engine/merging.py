"""The merge of an adapter: a change that adds the adapter's updates to a weight.

An update is computed matrix by matrix: the rows are axes that only one half has, the columns axes
that only the other half has. Axes that both have, as experts mostly, or neither, are looped over.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gptoss_convert.engine import sums
from gptoss_convert.engine.buffers import joined
from gptoss_convert.engine.derivations import Input
from gptoss_convert.engine.factors import F32, Factors
from gptoss_convert.engine.steps import Step
from gptoss_convert.engine.work import Work
from gptoss_convert.errors import IntegrityError, UsageError
from gptoss_convert.layouts.extents import overlap
from gptoss_convert.layouts.layout import Box
from gptoss_convert.layouts.updates import RANK, Factor, Update

U16 = NDArray[np.uint16]
EXACT, PEFT = "exact", "peft"
ARITHMETICS = (EXACT, PEFT)
_PIECE = 1 << 16
"""Elements of a DoRA matrix that are computed at once, about."""


@dataclass(frozen=True, eq=False)
class Merge:
    """A change of a weight: it gets all updates of it added, in place."""

    weight: str
    updates: Mapping[int, Sequence[Update]]
    """By layer, 0 for a weight of no layer."""
    factors: Factors
    arithmetic: str
    inputs: tuple[Input, ...] = ()

    @property
    def needs(self) -> frozenset[str]:
        """The weight alone: the halves of the updates are read beside the steps."""
        return frozenset({self.weight})

    makes = needs

    def run(self, work: Work) -> None:
        """Merge into what is held of the weight; raises IntegrityError for unusable updates."""
        for update in self._of(work.step):
            for part in joined(work.held[self.weight]):
                merge(update, part.box, part.array, self.factors, self.arithmetic)

    def _of(self, step: Step) -> Iterable[Update]:
        """The updates that may reach into a step's box, each once."""
        layers = step.box[step.layer_axis] if step.layer_axis >= 0 else (0, 1)
        found = (one for layer in range(*layers) for one in self.updates.get(layer, ()))
        return {id(one): one for one in found}.values()


def merges(updates: Iterable[Update], arithmetic: str) -> dict[str, tuple[Merge, ...]]:
    """The changes that a plan must make for these updates, by weight."""
    parts = tuple(updates)
    factors = Factors(parts)
    by_weight: dict[str, dict[int, list[Update]]] = defaultdict(lambda: defaultdict(list))
    for update in parts:
        layers = update.box[update.axes.index("layer")] if "layer" in update.axes else (0, 1)
        for layer in range(*layers):
            by_weight[update.param][layer].append(update)
    return {
        weight: (Merge(weight, layers, factors, arithmetic),)
        for weight, layers in by_weight.items()
    }


def merge(update: Update, box: Box, values: U16, factors: Factors, arithmetic: str) -> None:
    """Add an update to `values`, the BF16 bits of `box` of its parameter, any strides, in place."""
    common = overlap(update.box, box)
    if common is None:
        return
    inside = tuple(slice(lo - b, hi - b) for (lo, hi), (b, _) in zip(common, box, strict=True))
    part = values[inside]
    halves = [_spread(half, update.axes, common, factors) for half in (update.b, update.a)]
    if update.magnitude is not None:
        magnitude = _spread(update.magnitude, update.axes, common, factors)
        _merge_dora(update, part, common, halves, magnitude, arithmetic)
        return
    for matrix, p, q in _matrices(part, halves):
        if arithmetic == EXACT:
            sums.add_exact(matrix, p, q.T, update.scale)
        else:
            sums.add_as_peft(matrix, p, q.T, update.scale, update.kind != "module")


def _spread(factor: Factor | None, axes: Sequence[str], box: Box, factors: Factors) -> F32:
    """A factor's part of a box: all axes of the parameter and the rank, length 1 for those that it
    has not."""
    if factor is None:
        return np.ones([1] * (len(axes) + 1), np.float32)
    values = factors[factor]
    spans = dict(zip(axes, box, strict=True))
    index = [
        slice(*(edge - start for edge in spans[axis]))
        if axis in spans and length > 1
        else slice(None)
        for axis, length, start in zip(factor.axes, factor.lengths, factor.start, strict=True)
    ]
    part = values[tuple(index)]
    held = dict(zip(factor.axes, part.shape, strict=True))
    return part.reshape([held.get(axis, 1) for axis in (*axes, RANK)])


def _matrices(part: U16, halves: Sequence[F32]) -> Iterator[tuple[U16, F32, F32]]:
    """(matrix, p (rows, rank), q (columns, rank)) for all of a box, the columns the closest."""
    sides = [
        [i for i, n in enumerate(part.shape) if n > 1 and mine.shape[i] > 1 and other.shape[i] == 1]
        for mine, other in (halves, halves[::-1])
    ]
    chains = [_chain(part, side) for side in sides]
    if _distance(part, chains[0]) < _distance(part, chains[1]):
        chains, halves = chains[::-1], halves[::-1]
    loops = [i for i, n in enumerate(part.shape) if n > 1 and i not in (*chains[0], *chains[1])]
    for index in np.ndindex(*(part.shape[i] for i in loops)):
        at = dict(zip(loops, index, strict=True))
        p, q = (_narrow(half, chain, at) for half, chain in zip(halves, chains, strict=True))
        yield _matrix(part, chains, at), p, q


def _chain(part: U16, side: Sequence[int]) -> tuple[int, ...]:
    """The axes of one side, slowest first, that follow one another in memory as one axis would."""
    chain: list[int] = []
    for axis in sorted(side, key=lambda i: part.strides[i]):
        if chain and part.strides[axis] != part.strides[chain[0]] * part.shape[chain[0]]:
            break
        chain.insert(0, axis)
    return tuple(chain)


def _distance(part: U16, chain: Sequence[int]) -> float:
    """How far apart neighbours along a chain lie."""
    return part.strides[chain[-1]] if chain else math.inf


def _matrix(part: U16, chains: Sequence[Sequence[int]], at: Mapping[int, int]) -> U16:
    """The rows and columns of two chains at one index of the other axes."""
    where = tuple(slice(at.get(i, 0), at.get(i, 0) + 1) for i in range(part.ndim))
    chained = {*chains[0], *chains[1]}
    first = part[tuple(slice(None) if i in chained else one for i, one in enumerate(where))]
    shape = [math.prod(part.shape[i] for i in chain) for chain in chains]
    strides = [part.strides[chain[-1]] if chain else part.itemsize for chain in chains]
    return np.lib.stride_tricks.as_strided(first, shape, strides)


def _narrow(half: F32, chain: Sequence[int], at: Mapping[int, int]) -> F32:
    """A half at one index of the axes that are looped over: (the chain's elements, rank)."""
    last = half.ndim - 1
    index = [at.get(i, 0) if half.shape[i] > 1 else 0 for i in range(last)]
    picked = half[tuple(slice(None) if i in chain else index[i] for i in range(last))]
    order = sorted(chain)
    turned = picked.transpose(*(order.index(i) for i in chain), len(order))
    return np.ascontiguousarray(turned).reshape(-1, half.shape[last])


def _merge_dora(
    update: Update,
    part: U16,
    box: Box,
    halves: Sequence[F32],
    magnitude: F32,
    arithmetic: str,
) -> None:
    """W' = m / ‖W + s·b·a‖ · (W + s·b·a), the norm along the axes that the magnitude has not."""
    assert update.magnitude is not None
    rows = [i for i in range(part.ndim) if magnitude.shape[i] == part.shape[i] > 1]
    columns = [i for i, n in enumerate(part.shape) if n > 1 and i not in rows]
    for axis in columns:
        if box[axis] != update.box[axis]:
            raise IntegrityError(f"{update.magnitude.tensor}: a row of {update.param} was cut")
    turned = part.transpose(*rows, *columns, *(i for i, n in enumerate(part.shape) if n == 1))
    shape = [math.prod(part.shape[i] for i in side) for side in (rows, columns)]
    matrix = turned.reshape(shape)
    p, q = (_narrow(half, side, {}) for half, side in zip(halves, (rows, columns), strict=True))
    length = magnitude.reshape(-1)
    compute = _dora if arithmetic == EXACT else _dora_as_peft
    step = max(1, _PIECE // shape[1])
    made = np.empty(shape, np.uint16)
    for start in range(0, shape[0], step):
        some = slice(start, start + step)
        made[some] = compute(matrix[some], p[some], q.T, float(update.scale), length[some])
    turned[...] = made.reshape(turned.shape)


def _dora(matrix: U16, p: F32, q: F32, scale: float, length: F32) -> U16:
    """In float64, rounded once."""
    sums64 = sums.widened(matrix) + (p.astype(np.float64) @ q.astype(np.float64)) * scale
    norm = np.sqrt(np.einsum("xy,xy->x", sums64, sums64))
    return sums.nearest_of_any(sums64 * (length / norm)[:, None])


def _dora_as_peft(matrix: U16, p: F32, q: F32, scale: float, length: F32) -> U16:
    """In float32, the norm as torch sums it."""
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"--adapter-arithmetic peft: DoRA's norms are torch's (pip install torch): {error}"
        ) from None
    total = sums.narrowed(matrix) + sums.product(p, q) * np.float32(scale)
    norm = torch.linalg.norm(torch.from_numpy(total), dim=1).numpy()
    return sums.to_bf16((length / norm)[:, None] * total)

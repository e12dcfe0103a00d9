"""What only a report of exact values shows: signal-to-noise by expert, histograms of scales."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from gptoss_convert.compare.diagnosis import Bits
from gptoss_convert.engine.buffers import Parts
from gptoss_convert.engine.steps import Step

_AT_ONCE = 1 << 18
"""Elements widened to float at once: they stay in the cache."""
_NO_SIGNAL = -100.0
"""Decibels that stand for differences from a source of zeros."""


@dataclass(frozen=True, slots=True)
class Energy:
    """Sums of squares of the source and of its difference from the target; a sum of parts."""

    signal: float = 0.0
    noise: float = 0.0
    nonfinite: int = 0
    """Elements that differ where one side is no finite number: in neither sum."""

    def __add__(self, other: Energy) -> Energy:
        return Energy(
            self.signal + other.signal,
            self.noise + other.noise,
            self.nonfinite + other.nonfinite,
        )

    @property
    def sqnr(self) -> float | None:
        """Signal to quantisation noise in dB; None without noise."""
        if not self.noise:
            return None
        return max(_NO_SIGNAL, 10 * math.log10(max(self.signal / self.noise, 1e-300)))


@dataclass(frozen=True)
class StepStatistics:
    """Of one step: the energy by expert (-1 for weights that are never MXFP4), and its scales."""

    energies: Mapping[int, Energy]
    source_scales: tuple[int, ...]
    """How often each of the 256 scales occurs; empty where the side holds BF16."""
    target_scales: tuple[int, ...]


@dataclass
class ValueStatistics:
    """Of two checkpoints, as plain data."""

    sqnr: dict[str, list[list[float | None]]] = field(default_factory=dict)
    """By expert weight, layer, expert, in dB; None where every value is equal."""
    nonfinite: int = 0
    """Elements that differ where one side is no finite number: in no SQNR."""
    source_scales: dict[str, list[int]] = field(default_factory=dict)
    """By MXFP4 weight, how often each of the 256 scales occurs."""
    target_scales: dict[str, list[int]] = field(default_factory=dict)


def step_statistics(step: Step, ours: Bits, theirs: Bits, held: Sequence[Parts]) -> StepStatistics:
    """The statistics of one step whose values are `ours` and `theirs`, `held` as in the files."""
    source, target = (_scales(step, parts) for parts in held)
    return StepStatistics(dict(_energies(step, ours, theirs)), source, target)


def _scales(step: Step, held: Parts) -> tuple[int, ...]:
    guides = (part for param in step.family.guides for part in held.get(param, ()))
    parts = [part for part in guides if part.array.itemsize == 1]
    if not parts:
        return ()
    counts = sum(np.bincount(part.array.reshape(-1), minlength=256) for part in parts)
    return tuple(np.asarray(counts).tolist())


def _energies(step: Step, ours: Bits, theirs: Bits) -> Iterator[tuple[int, Energy]]:
    if not step.family.encodings:
        yield -1, _energy(ours, theirs)
        return
    axis = step.family.axes.index("expert")
    pairs = zip(np.moveaxis(ours, axis, 0), np.moveaxis(theirs, axis, 0), strict=True)
    for expert, (a, b) in enumerate(pairs, step.box[axis][0]):
        yield expert, _energy(a, b)


def _energy(ours: Bits, theirs: Bits) -> Energy:
    found = Energy()
    a, b = ours.reshape(-1), theirs.reshape(-1)
    for start in range(0, len(a), _AT_ONCE):
        found += _small_energy(a[start : start + _AT_ONCE], b[start : start + _AT_ONCE])
    return found


def _small_energy(a: Bits, b: Bits) -> Energy:
    x = _floats(a)
    if np.array_equal(a, b):
        return Energy(signal=_square(x))
    y = _floats(b)
    finite = np.isfinite(x) & np.isfinite(y)
    if finite.all():
        return Energy(_square(x), _square(x - y))
    lost = int(np.count_nonzero((a != b) & ~finite))
    return Energy(_square(x[finite]), _square(x[finite] - y[finite]), lost)


def _floats(bits: Bits) -> npt.NDArray[np.float32]:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def _square(values: npt.NDArray[np.float32]) -> float:
    """The sum of squares: in float32, which is fast; again in float64 where that overflows.

    Not by a dot product: BLAS starts threads of its own for one, in each of our threads.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        quick = float(np.einsum("i,i->", values, values))
    if math.isfinite(quick):
        return quick
    wide = values.astype(np.float64)
    return float(np.einsum("i,i->", wide, wide))


def sqnr(found: Iterable[StepStatistics]) -> float | None:
    """Of all steps together, in dB; None without noise."""
    return sum((e for one in found for e in one.energies.values()), Energy()).sqnr


def gathered(found: Iterable[tuple[Step, StepStatistics]]) -> ValueStatistics:
    """The statistics of all steps."""
    whole = ValueStatistics()
    energies: dict[str, dict[tuple[int, int], Energy]] = defaultdict(lambda: defaultdict(Energy))
    for step, one in found:
        weight = step.family.weight
        for expert, energy in one.energies.items():
            whole.nonfinite += energy.nonfinite
            if expert >= 0:
                energies[weight][step.layer, expert] += energy
        _count(whole.source_scales, weight, one.source_scales)
        _count(whole.target_scales, weight, one.target_scales)
    for weight, cells in energies.items():
        layers, experts = (sorted(set(axis)) for axis in zip(*cells, strict=True))
        whole.sqnr[weight] = [[cells[n, m].sqnr for m in experts] for n in layers]
    return whole


def _count(counts: dict[str, list[int]], weight: str, more: Sequence[int]) -> None:
    if more:
        held = counts.get(weight, [0] * len(more))
        counts[weight] = [a + b for a, b in zip(held, more, strict=True)]

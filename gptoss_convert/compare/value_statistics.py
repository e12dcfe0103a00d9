"""What only a report of exact values shows: signal-to-noise by expert, histograms of scales."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from gptoss_convert.codecs.mxfp4.sums import count_bytes
from gptoss_convert.compare.arrays import Bits, Distance, distance, sum_of
from gptoss_convert.engine.buffers import Parts
from gptoss_convert.engine.steps import Step

_NO_SIGNAL = -100.0
"""Decibels that stand for differences from a source of zeros."""


@dataclass(frozen=True)
class StepStatistics:
    """Of one step: what is no number in it, and its scales."""

    nonfinite: int
    """Elements that are no finite number on either side."""
    source_scales: tuple[int, ...]
    """How often each of the 256 scales occurs; empty where the side holds BF16."""
    target_scales: tuple[int, ...]


@dataclass
class ValueStatistics:
    """Of two checkpoints, as plain data."""

    sqnr: dict[str, list[list[float | None]]] = field(default_factory=dict)
    """By expert weight, layer, expert, in dB; None where every value is equal."""
    nonfinite: int = 0
    """Elements that are no finite number on either side: in no SQNR."""
    source_scales: dict[str, list[int]] = field(default_factory=dict)
    """By MXFP4 weight, how often each of the 256 scales occurs."""
    target_scales: dict[str, list[int]] = field(default_factory=dict)


def step_statistics(step: Step, nonfinite: int, held: Sequence[Parts]) -> StepStatistics:
    """The statistics of one step, from what is no number and what the files of both sides hold."""
    source, target = (_scales(step, parts) for parts in held)
    return StepStatistics(nonfinite, source, target)


def _scales(step: Step, held: Parts) -> tuple[int, ...]:
    hints = (part for param in step.family.hints for part in held.get(param, ()))
    parts = [part for part in hints if part.array.itemsize == 1]
    if not parts:
        return ()
    counts = sum(count_bytes(part.array) for part in parts)
    return tuple(np.asarray(counts).tolist())


def distances_of(step: Step, ours: Bits, theirs: Bits) -> dict[int, Distance]:
    """How far two sides of a step lie apart, by expert; -1 for weights that are never MXFP4."""
    if not step.family.encodings:
        return {-1: distance(ours, theirs)}
    axis = step.family.axes.index("expert")
    pairs = zip(np.moveaxis(ours, axis, 0), np.moveaxis(theirs, axis, 0), strict=True)
    return {expert: distance(a, b) for expert, (a, b) in enumerate(pairs, step.box[axis][0])}


def sqnr(distances: Iterable[Distance]) -> float | None:
    """Signal to quantisation noise in dB, of all together; None without noise."""
    whole = sum_of(distances)
    if not whole.squared_change:
        return None
    return max(_NO_SIGNAL, 10 * math.log10(max(whole.squares / whole.squared_change, 1e-300)))


def gathered(
    found: Iterable[tuple[Step, StepStatistics]],
    apart: Iterable[tuple[str, int | None, Mapping[int, Distance]]],
) -> ValueStatistics:
    """The statistics of all steps; `apart` are weight, layer and distances of experts that differ,
    each complete."""
    whole = ValueStatistics()
    held: dict[str, dict[tuple[int, int], list[Distance]]] = defaultdict(dict)
    for step, one in found:
        weight = step.family.weight
        whole.nonfinite += one.nonfinite
        if step.family.encodings:
            experts = range(*step.box[step.family.axes.index("expert")])
            held[weight] |= {(step.layer, expert): [] for expert in experts}
        _count(whole.source_scales, weight, one.source_scales)
        _count(whole.target_scales, weight, one.target_scales)
    for weight, layer, distances in apart:
        for expert, one in distances.items():
            if layer is not None and expert >= 0:
                held[weight][layer, expert].append(one)
    for weight, cells in held.items():
        layers, experts = (sorted(set(axis)) for axis in zip(*cells, strict=True))
        whole.sqnr[weight] = [[sqnr(cells[n, m]) for m in experts] for n in layers]
    return whole


def _count(counts: dict[str, list[int]], weight: str, more: Sequence[int]) -> None:
    if more:
        held = counts.get(weight, [0] * len(more))
        counts[weight] = [a + b for a, b in zip(held, more, strict=True)]

"""What the values level measured: how much of each expert is left, scales, worst tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from gptoss_convert.show.report_page import figures
from gptoss_convert.show.report_page.document import (
    NONE,
    SHOWN,
    Code,
    Figure,
    Part,
    Section,
    Table,
    columns,
    counted,
    power,
    share,
    visible,
)


def value_sections(values: Mapping[str, Any]) -> Iterator[Section]:
    """What differs in the weights, and their MXFP4 scales."""
    yield from _quantisation(values)
    yield from _scales(values)
    yield from _worst(values)


def _quantisation(values: Mapping[str, Any]) -> Iterator[Section]:
    statistics = values["statistics"] or {"sqnr": {}}
    maps = statistics["sqnr"]
    cells = [
        (cell, weight, layer, expert)
        for weight, rows in maps.items()
        for layer, row in enumerate(rows)
        for expert, cell in enumerate(row)
        if cell is not None
    ]
    if not cells:
        return
    cells.sort()
    low, weight, layer, expert = cells[0]
    total = sum(len(row) for rows in maps.values() for row in rows)
    title = f"Worst: {low:.1f} dB, {weight} of layer {layer}, expert {expert}"
    differing = {w: rows for w, rows in maps.items() if any(c is not None for r in rows for c in r)}
    rows = tuple((f"{c:.1f}", w, str(n), str(e)) for c, w, n, e in cells[:SHOWN])
    figure = Figure(
        "sqnr",
        title,
        "Signal to quantisation noise: the energy of SOURCE's weights over that of the difference. "
        "About 18 dB is what MXFP4 leaves of weights with a normal distribution; near 0 dB nothing "
        "is left of the signal, and a mistake is the likelier reason. Each shade begins at its "
        "number.",
        partial(figures.sqnr_maps, differing),
        Table(columns("#dB", "weight", "#layer", "#expert"), rows),
    )
    lead = (
        f"{len(cells):,} of {total:,} expert matrices differ; "
        f"{cells[len(cells) // 2][0]:.1f} dB in the middle."
    )
    yield Section("How much of each expert is left?", lead, (figure,))


def _scales(values: Mapping[str, Any]) -> Iterator[Section]:
    statistics = values["statistics"]
    if not statistics:
        return
    ours, theirs = statistics["source_scales"], statistics["target_scales"]
    parts: list[Part] = []
    for weight in dict.fromkeys([*ours, *theirs]):
        source, target = ours.get(weight), theirs.get(weight)
        parts.append(_histogram(weight, source, target))
    if parts:
        lead = "One scale, a power of two, for each block of 32 values."
        yield Section("How are the MXFP4 scales spread?", lead, tuple(parts))


def _histogram(weight: str, source: Sequence[int] | None, target: Sequence[int] | None) -> Figure:
    known = [side for side in (source, target) if side]
    used = [n for n in range(256) if any(side[n] for side in known)]
    span = f"{power(2, used[0] - 127)} to {power(2, used[-1] - 127)}"
    if source and target:
        alike = "the same counts on both sides" if source == target else "other counts in TARGET"
        title = f"{weight}: {span}, {alike}"
    else:
        title = f"{weight}: {span}; only {'SOURCE' if source else 'TARGET'} is MXFP4"
    rows = tuple(
        (power(2, n - 127), *(f"{side[n]:,}" if side else NONE for side in (source, target)))
        for n in used
    )
    return Figure(
        f"scales-{weight.partition('.')[0]}",
        title,
        "A lone bar far to the left is blocks of zeros, one far to the right a block with an "
        "outlier.",
        partial(figures.scales, source, target),
        Table(columns("#scale", "#SOURCE, blocks", "#TARGET, blocks"), rows),
    )


def _worst(values: Mapping[str, Any]) -> Iterator[Section]:
    found = values["differences"]
    if not found:
        return
    known = sorted(found, key=_badness)
    titles = ("#layer", "#differ", "#SQNR, dB", "tensor of TARGET", "#values that differ")
    worst = ("looks", "worst at", "#in SOURCE", "#in TARGET", "#BF16 steps")
    rows = tuple(_difference(one) for one in known[:SHOWN])
    more = f", the {SHOWN} worst" if len(found) > SHOWN else ""
    lead = f"{counted(len(found), 'parameter')} of a layer or of the model differ{more}."
    table = Table(columns(*titles, *worst), rows)
    yield Section("Which tensors are worst?", lead, (table,))


def _badness(one: Mapping[str, Any]) -> tuple[float, float]:
    """Lowest SQNR first, then the largest share that differs."""
    sqnr = math.inf if one["sqnr"] is None else one["sqnr"]
    return sqnr, -one["differing"] / one["elements"]


def _difference(one: Mapping[str, Any]) -> tuple[str, ...]:
    worst = one["worst"]
    return (
        NONE if one["layer"] is None else str(one["layer"]),
        share(one["differing"] / one["elements"]),
        NONE if one["sqnr"] is None else f"{one['sqnr']:.1f}",
        Code(visible(min(one["target_tensors"]))),
        f"{one['differing']:,}",
        visible(one["looks"] or NONE),
        str([*worst["index"]]),
        f"{worst['source']:g}",
        f"{worst['target']:g}",
        f"{worst['ulps']:,}",
    )

"""The figures of a verification's report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gptoss_convert.show.report_page.axes import (
    LogLane,
    Matrix,
    draw_map,
    key,
    shades,
    spaced,
    stretches,
)
from gptoss_convert.show.report_page.drawing import COLOUR, NARROW, blank

Layers = Sequence[Mapping[str, Any]]
"""Of a parity report, as plain data."""
BLOCKS = ("attention", "router", "experts")
_MARKS = {"attention": "o", "router": "D", "experts": "s"}


def divergence(layers: Layers, limit: float, first: Mapping[str, Any] | None, width: int) -> Figure:
    """Relative error after each sub-block, above the size of the residual stream of both sides."""
    errors = [error for layer in layers for error in layer["errors"]]
    lane = LogLane.of([*(e["error"] for e in errors), limit])
    figure = blank(width, 200 + lane.height)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[lane.height, 80])
    places = [e["layer"] + BLOCKS.index(e["block"]) / 3 for e in errors]
    lane.set_on(upper)
    upper.plot(places, [lane.at(e["error"]) for e in errors], color=COLOUR["grid"], linewidth=1)
    for block in BLOCKS:
        chosen = [(x, e) for x, e in zip(places, errors, strict=True) if e["block"] == block]
        upper.plot(
            [x for x, _ in chosen],
            [lane.at(e["error"]) for _, e in chosen],
            _MARKS[block],
            color=COLOUR[block],
            markersize=4.5,
            label=block,
        )
    _draw_limit(upper, lane, limit, len(layers) - 0.2, "right")
    if first:
        x = first["layer"] + BLOCKS.index(first["block"]) / 3
        upper.plot(
            [x],
            [lane.at(first["error"])],
            "o",
            markersize=13,
            markerfacecolor="none",
            markeredgecolor=COLOUR["limit"],
            markeredgewidth=1.4,
        )
    upper.set_title("relative error after each sub-block, worst position", pad=26)
    _legend(upper, 3)
    _draw_sizes(lower, layers)
    lower.set_xlabel("layer")
    lower.set_xticks(spaced(len(layers), 12 if width > NARROW else 8))
    return figure


def _draw_limit(axes: Axes, lane: LogLane, limit: float, x: float, side: str) -> None:
    axes.axhline(lane.at(limit), color=COLOUR["limit"], linewidth=1.2, linestyle=(0, (4, 2)))
    axes.annotate(
        f"limit {limit:g}",
        (x, lane.at(limit)),
        (0, 2),
        textcoords="offset points",
        color=COLOUR["limit"],
        ha=side,
        va="bottom",
        fontsize=10,
    )


def _draw_sizes(axes: Axes, layers: Layers) -> None:
    """The residual stream after attention and experts; the router's output is not part of it."""
    found = [e for layer in layers for e in layer["errors"] if e["block"] != "router"]
    places = [e["layer"] + BLOCKS.index(e["block"]) / 3 for e in found]
    for side, line, wide in (("source", "-", 3.2), ("target", "-", 1.2)):
        sizes = [e[f"{side}_rms"] for e in found]
        axes.plot(places, sizes, line, color=COLOUR[side], linewidth=wide, label=side.upper())
    if all(0 < e[f"{side}_rms"] < math.inf for e in found for side in ("source", "target")):
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title("size of the residual stream (RMS)", pad=22)
    _legend(axes, 2)
    axes.grid(axis="y")
    axes.tick_params(length=0)


def kl_by_position(
    ranges: Sequence[Mapping[str, Any]], limit: float, marks: Mapping[str, int], width: int
) -> Figure:
    """KL by position, with the borders of the window and of YaRN's original length."""
    lane = LogLane.of([*(r["kl_max"] for r in ranges), *(r["kl_mean"] for r in ranges), limit])
    figure = blank(width, 110 + lane.height)
    axes = figure.subplots()
    lane.set_on(axes)
    edges = [(_along(r["start"]), _along(r["end"])) for r in ranges]
    axes.hlines(
        [lane.at(r["kl_max"]) for r in ranges],
        [a for a, _ in edges],
        [b for _, b in edges],
        color=COLOUR["source"],
        linewidth=2.6,
        label="worst",
    )
    axes.plot(
        [(a + b) / 2 for a, b in edges],
        [lane.at(r["kl_mean"]) for r in ranges],
        "o",
        color=COLOUR["target"],
        markersize=4,
        label="mean",
    )
    last = ranges[-1]["end"]
    axes.set_xlim(-0.05, _along(last) + 0.1)
    ticks = [0, *(10**n for n in range(7) if 10**n < last)]
    axes.set_xticks([_along(n) for n in ticks], [f"{n:,}" for n in ticks])
    for label, place in marks.items():
        if place < last:
            axes.axvline(_along(place), color=COLOUR["muted"], linewidth=1, linestyle=(0, (2, 2)))
            axes.text(
                _along(place),
                1.01,
                f"{label} {place:,}",
                ha="center",
                va="bottom",
                transform=axes.get_xaxis_transform(),
                fontsize=10,
                color=COLOUR["muted"],
            )
    _draw_limit(axes, lane, limit, 0.0, "left")
    axes.set_xlabel("position in the sequence")
    axes.set_title("KL divergence, nats", pad=38)
    _legend(axes, 2, 1.07)
    return figure


def _legend(axes: Axes, entries: int, above: float = 1.0) -> None:
    axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, above),
        ncols=entries,
        borderpad=0,
        handlelength=1.2,
        handletextpad=0.4,
        columnspacing=1.2,
    )


def _along(position: int) -> float:
    """Where a position lies: logarithmic, with room for position 0."""
    return math.log10(position + 1)


EVEN = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
"""Classes of an expert's load, in shares of an even load: each begins there."""


def loads(hits: Sequence[Sequence[int]]) -> list[list[int]]:
    """Each expert's class by load: 0 for never, then as EVEN."""
    found: list[list[int]] = []
    for row in hits:
        even = sum(row) / len(row)
        found.append(
            [0 if hit == 0 else sum(hit >= border * even for border in EVEN) for hit in row]
        )
    return found


def expert_maps(layers: Layers, width: int) -> Figure:
    """How often each expert was chosen, layers by experts, beside the agreement of routing."""
    high = max(120, min(9 * len(layers), 330))
    figure = blank(width, 105 + high)
    ratios = [4 if width > NARROW else 3, 1]
    grid = figure.add_gridspec(2, 2, width_ratios=ratios, height_ratios=[high, 34])
    left = figure.add_subplot(grid[0, 0])
    right = figure.add_subplot(grid[0, 1], sharey=left)
    colours = [COLOUR["limit"], *shades(len(EVEN))]
    draw_map(left, loads([layer["source_hits"] for layer in layers]), colours)
    left.set_title("how often each expert was chosen")
    left.set_ylabel("layer")
    left.set_xlabel("expert")
    agreement = [layer["routing_agreement"] for layer in layers]
    lowest = min(agreement)
    right.plot(
        [100 * share for share in agreement],
        range(len(layers)),
        "o",
        color=COLOUR["router"],
        markersize=3.5,
    )
    right.set_xlim(100 * lowest - max(1, 8 * (1 - lowest)), 100 + max(0.4, 8 * (1 - lowest)))
    right.set_xticks([100 * lowest, 100] if lowest < 1 else [100])
    right.set_title("same routing")
    right.xaxis.set_major_formatter("{x:.4g} %")
    right.tick_params(axis="y", length=0, labelleft=False)
    right.grid(axis="x")
    right.spines["left"].set_visible(False)
    words = ("never", "< ¼", "¼", "½", "1", "2", "≥ 4")
    key(figure.add_subplot(grid[1, :]), [*zip(colours, words, strict=True)])
    return figure


def scales(source: Sequence[int] | None, target: Sequence[int] | None, width: int) -> Figure:
    """How often each MXFP4 scale occurs, as powers of two; scales that nobody uses are cut out."""
    figure = blank(width, 220)
    axes = figure.subplots()
    used = [n for n in range(256) if any(side[n] for side in (source, target) if side)]
    places = stretches(used)
    both = bool(source and target)
    for side, label, colour in ((source, "SOURCE", "source"), (target, "TARGET", "target")):
        if side:
            shift = (-0.2 if side is source else 0.2) if both else 0
            axes.bar(
                [x + shift for x in places],
                [side[n] for n in used],
                width=0.4 if both else 0.8,
                color=COLOUR[colour],
                label=label,
            )
    axes.set_yscale("log")
    axes.set_ylim(bottom=0.7)
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.tick_params(length=0)
    axes.set_xlim(-0.8, max(places[-1], 8) + 0.8)
    shown = spaced(len(used), 20 if width > NARROW else 10)
    axes.set_xticks([places[n] for n in shown], [_exponent(used[n] - 127) for n in shown])
    axes.set_xlabel("exponent of the scale, a power of two")
    axes.set_title("blocks of 32 values", pad=22)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    _legend(axes, 2)
    return figure


def _exponent(number: int) -> str:
    return f"{number}".replace("-", "−")


def sqnr_borders(cells: Sequence[float]) -> list[float]:
    """Borders of at most seven classes of SQNR, whole steps of decibels, ascending."""
    low, high = math.floor(min(cells)), math.floor(max(cells)) + 1
    step = next(s for s in (0.5, 1, 2, 3, 5, 10, 20, 50) if (high - low) / s <= 7)
    start = math.floor(low / step) * step
    return [start + n * step for n in range(math.ceil((high - start) / step))]


def sqnr_maps(maps: Mapping[str, Matrix], width: int) -> Figure:
    """SQNR of each expert, layers by experts, a map for each weight; the worst is the darkest."""
    rows = max(len(one) for one in maps.values())
    high = max(90, min(9 * rows, 330))
    beside = width > NARROW
    shape = (2, len(maps)) if beside else (len(maps) + 1, 1)
    ratios = [high, 34] if beside else [high] * len(maps) + [34]
    figure = blank(width, sum(ratios) + (70 if beside else 40 * len(maps) + 40))
    grid = figure.add_gridspec(*shape, height_ratios=ratios)
    known = [cell for one in maps.values() for row in one for cell in row if cell is not None]
    borders = sqnr_borders(known)
    colours = [*reversed(shades(len(borders) + 1))]
    for n, (weight, cells) in enumerate(maps.items()):
        axes = figure.add_subplot(grid[0, n] if beside else grid[n, 0])
        classes = [
            [len(borders) if cell is None else sum(cell >= b for b in borders[1:]) for cell in row]
            for row in cells
        ]
        draw_map(axes, classes, colours)
        axes.set_title(weight)
        axes.set_xlabel("expert")
        axes.set_ylabel("layer" if n == 0 or not beside else "")
    below = figure.add_subplot(grid[-1, :])
    entries = [*zip(colours, [*(f"{b:g} dB" for b in borders), "equal"], strict=True)]
    key(below, entries)
    return figure

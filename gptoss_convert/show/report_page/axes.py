"""What several figures share: log axes with a lane for exact zeros, maps of cells, their keys."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from matplotlib.axes import Axes
from matplotlib.patches import PathPatch
from matplotlib.path import Path

from gptoss_convert.show.report_page.document import power
from gptoss_convert.show.report_page.drawing import COLOUR, SHADE

Matrix = Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class LogLane:
    """A logarithmic axis with a lane below for exact zeros, and one above for infinities."""

    low: int
    """Exponent of the lowest decade."""
    high: int
    zeros: bool
    infinities: bool

    @classmethod
    def of(cls, values: Sequence[float]) -> LogLane:
        """The axis that holds all values."""
        known = [value for value in values if value > 0 and math.isfinite(value)]
        low = math.floor(math.log10(min(known))) if known else -1
        high = math.ceil(math.log10(max(known))) if known else 0
        infinite = any(not math.isfinite(value) for value in values)
        return cls(low, max(high, low + 1), any(value == 0 for value in values), infinite)

    @property
    def height(self) -> int:
        """Pixels in which its decades can be told apart."""
        return min(200, 60 + 25 * (self.high - self.low))

    def at(self, value: float) -> float:
        """Where a value lies; NaN lies with the infinities."""
        if not math.isfinite(value):
            return self.high + 1
        return math.log10(value) if value > 0 else self.low - 1

    def set_on(self, axes: Axes, ticks: int = 5) -> None:
        """Scale and label the y axis."""
        every = max(1, math.ceil((self.high - self.low) / ticks))
        decades = [*range(self.low, self.high + 1, every)]
        places = [*decades, *[self.low - 1] * self.zeros, *[self.high + 1] * self.infinities]
        labels = [power(10, n) for n in decades]
        axes.set_yticks(places, [*labels, *["0"] * self.zeros, *["∞"] * self.infinities])
        axes.set_ylim(self.low - 0.3 - 1.1 * self.zeros, self.high + 0.3 + 1.1 * self.infinities)
        axes.grid(axis="y")
        axes.tick_params(length=0)
        if self.zeros:
            axes.axhline(self.low - 0.5, color=COLOUR["grid"], linewidth=0.8, linestyle=(0, (1, 2)))


def stretches(used: Sequence[int], gap: int = 4) -> list[float]:
    """Places of ascending numbers on an axis on which what lies between stretches is cut out."""
    places = [0.0]
    for last, one in pairwise(used):
        places.append(places[-1] + (one - last if one - last <= gap else 2))
    return places


def draw_map(axes: Axes, classes: Sequence[Sequence[int | None]], colours: Sequence[str]) -> None:
    """Cells by class, rows downwards from 0: one path a class, which keeps the page small."""
    for n, colour in enumerate(colours):
        cells = [(x, y) for y, row in enumerate(classes) for x, cell in enumerate(row) if cell == n]
        if cells:
            path = Path.make_compound_path(*(_cell(x, y) for x, y in cells))
            axes.add_patch(PathPatch(path, facecolor=colour, linewidth=0))
    rows, width = len(classes), max(map(len, classes))
    axes.set_xlim(-0.5, width - 0.5)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.set_xticks(spaced(width))
    axes.set_yticks(spaced(rows))
    axes.tick_params(length=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _cell(x: int, y: int, half: float = 0.46) -> Path:
    corners = [(-half, -half), (half, -half), (half, half), (-half, half), (-half, -half)]
    return Path([(x + dx, y + dy) for dx, dy in corners], closed=True)


def spaced(count: int, most: int = 8) -> list[int]:
    """Numbers below `count` to label, evenly apart, from 0."""
    step = next(s for n in range(9) for s in (10**n, 2 * 10**n, 4 * 10**n, 5 * 10**n, 8 * 10**n)
                if count / s <= most)  # fmt: skip
    return [*range(0, count, step)]


def key(axes: Axes, entries: Sequence[tuple[str, str]]) -> None:
    """A row of squares, each with its meaning below."""
    axes.set_xlim(-0.5, max(7, len(entries)) - 0.5)
    axes.set_ylim(-1.2, 0.6)
    for n, (colour, text) in enumerate(entries):
        corners = [(-0.5, 0), (0.5, 0), (0.5, 0.5), (-0.5, 0.5), (-0.5, 0)]
        path = Path([(n + 0.97 * dx, dy) for dx, dy in corners], closed=True)
        axes.add_patch(PathPatch(path, facecolor=colour, linewidth=0))
        axes.text(n, -0.2, text, ha="center", va="top", fontsize=10, color=COLOUR["muted"])
    axes.axis("off")


def shades(count: int) -> list[str]:
    """`count` colours from little to much, spread over the palette."""
    last = len(SHADE) - 1
    return [SHADE[round(n * last / max(1, count - 1))] for n in range(count)]

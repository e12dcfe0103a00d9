"""The figure of docs/performance.md: `python -m benchmarks.plot RESULTS.json FIGURE.svg`."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.bench import FORMATS, Rounds

OURS, LIMIT = "#0072b2", "#bbbbbb"
"""Blue and grey: told apart by everybody, and in print."""


def main(results: Path, figure: Path) -> None:
    result = json.loads(results.read_text())
    plt.rcParams.update({"font.size": 9, "svg.hashsalt": "gptoss-convert", "svg.fonttype": "none"})
    drawing, (left, middle, right) = plt.subplots(
        1, 3, figsize=(11, 4.2), layout="constrained", width_ratios=(2, 1, 1)
    )
    _pairs(left, result["rounds"])
    _scaling(middle, right, result.get("scaling", {}))
    for axes in (left, middle, right):
        axes.spines[["top", "right"]].set_visible(False)
    drawing.savefig(figure, metadata={"Date": None})


def _pairs(axes: Any, rounds: Rounds) -> None:
    """Bytes read and written a second, each pair beside the same program without its kernels."""
    names = [f"{a} -> {b}" for a in FORMATS for b in FORMATS if a != b]
    for offset, suffix, color, label in (
        (-0.2, "", OURS, "conversion"),
        (0.2, ", I/O alone", LIMIT, "the same program, kernels left out"),
    ):
        rates = [
            [(one["read"] + one["written"]) / one["seconds"] / 1e9 for one in rounds[name + suffix]]
            for name in names
        ]
        middles = [statistics.median(row) for row in rates]
        spread = [
            [m - min(row) for m, row in zip(middles, rates, strict=True)],
            [max(row) - m for m, row in zip(middles, rates, strict=True)],
        ]
        places = [i + offset for i in range(len(names))]
        axes.barh(places, middles, 0.38, xerr=spread, color=color, label=label, ecolor="#555555")
    axes.set_yticks(range(len(names)), [name.replace("->", "→") for name in names])
    axes.invert_yaxis()
    axes.set_xlabel("GB/s read and written, synced; median, smallest, largest")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)


def _scaling(time: Any, memory: Any, scaling: dict[str, Any]) -> None:
    """Seconds and peak memory against the bytes written."""
    for model, marker in (("20b", "o"), ("120b", "s")):
        points = [one for name, one in scaling.items() if name.startswith(f"{model},")]
        written = [one["written"] / 1e9 for one in points]
        time.plot(written, [one["seconds"] for one in points], marker, color=OURS, label=model)
        peaks = [one["peak_rss"] / 1e6 for one in points]
        memory.plot(written, peaks, marker, color=OURS, label=model)
    for axes, label in ((time, "seconds, synced"), (memory, "peak memory, MB")):
        axes.set_xlabel("GB written, hf-mxfp4 → hf-bf16")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
        axes.legend(frameon=False, loc="lower right")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

"""Conversions against this machine's limits and against peers: `make bench`.

Every round runs every case once, in random order, so that all see the same weather; ratios are
taken within a round and their median is printed with the smallest and largest. Results go to a JSON
file, with the machine's description, for docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from benchmarks.cases import measure, remove

FORMATS = {
    "hf-mxfp4": ("hf", "mxfp4"),
    "hf-bf16": ("hf", "bf16"),
    "openai": ("openai", "keep"),
    "megatron": ("megatron", "keep"),
}
Rounds = dict[str, list[dict[str, Any]]]


def main() -> None:
    options = _arguments()
    work: Path = options.work
    work.mkdir(parents=True, exist_ok=True)
    sources = _sources(work, options)
    cases = _cases(sources, work, options)
    rounds: Rounds = defaultdict(list)
    result = {"machine": _machine(work), "layers": options.layers, "rounds": rounds}
    for number in range(options.rounds):
        for name in random.Random(number).sample(sorted(cases), len(cases)):
            rounds[name].append(measure(*cases[name]))
            remove(work / "target")
            seconds = rounds[name][-1]["seconds"]
            print(f"round {number + 1}  {name:<40} {seconds:8.2f} s", file=sys.stderr)
        # After every round: what has been measured is kept if a later one is stopped.
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rounds))
    if options.scaling:
        result["scaling"] = scaling = _scaling(work, options)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(scaling_table(scaling))
    if not options.keep:
        remove(work)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("benchmarks/work"), help="on the disk")
    parser.add_argument("--layers", type=int, default=5, help="layers of 20b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", action="store_true", help="transformers and DCP too (2 layers)")
    parser.add_argument("--scaling", action="store_true", help="1 to 8 layers, and 2 of 120b")
    parser.add_argument("--full", action="store_true", help="with --scaling: all 24 layers too")
    parser.add_argument("--keep", action="store_true", help="leave the checkpoints in --work")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results.json"))
    return parser.parse_args()


def _synth(path: Path, model: str, layers: int) -> Path:
    if not path.exists():
        arguments = ["synth", str(path), "--model", model, "--layers", str(layers), "--quiet"]
        subprocess.run(
            [sys.executable, "-m", "gptoss_convert", *arguments],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return path


def _sources(work: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The same model in all four formats."""
    sources = {"hf-mxfp4": _synth(work / "hf-mxfp4", "20b", options.layers)}
    for name in ("hf-bf16", "openai", "megatron"):
        sources[name] = work / name
        if not sources[name].exists():
            measure("convert", str(sources["hf-mxfp4"]), str(sources[name]), *FORMATS[name])
    if options.peers:
        sources["peers"] = _synth(work / "peers", "20b", 2)
    return sources


def _cases(
    sources: dict[str, Path], work: Path, options: argparse.Namespace
) -> dict[str, tuple[str, ...]]:
    target = str(work / "target")
    cases: dict[str, tuple[str, ...]] = {}
    for source in FORMATS:
        for name, (to, dtype) in FORMATS.items():
            if source != name:
                pair = f"{source} -> {name}"
                arguments = (str(sources[source]), target, to, dtype)
                cases[pair] = ("convert", *arguments)
                cases[f"{pair}, I/O alone"] = ("convert", *arguments, "kernels")
    main_pair = (str(sources["hf-mxfp4"]), target, "hf", "bf16")
    cases["hf-mxfp4 -> hf-bf16, no digests"] = ("convert", *main_pair, "digests")
    bf16 = sum(p.stat().st_size for p in sources["hf-bf16"].rglob("*") if p.is_file())
    cases["dd direct, write the BF16 bytes"] = ("write_limit", target, str(bf16))
    cases["dd direct, read the MXFP4 bytes"] = ("read_limit", str(sources["hf-mxfp4"]))
    cases["cp + fsync of the BF16 output"] = ("copy", str(sources["hf-bf16"]), target)
    both = (str(sources["hf-mxfp4"]), str(sources["hf-bf16"]))
    cases["verify values, hf-mxfp4 and hf-bf16"] = ("verify", *both)
    cases["verify values, reading alone"] = ("verify", *both, "kernels")
    cases["--help"] = ("command", "--help")
    cases["inspect"] = ("command", "inspect", both[0])
    dry = ("convert", both[0], target, "--to", "hf", "--dtype", "bf16", "--dry-run")
    cases["convert --dry-run"] = ("command", *dry)
    if options.peers:
        peer = str(sources["peers"])
        cases["2 layers: transformers load + save"] = ("transformers", peer, target)
        cases["2 layers: hf-mxfp4 -> hf-bf16"] = ("convert", peer, target, "hf", "bf16")
        cases["DCP, default writer"] = ("dcp", target, "4")
    return cases


def _scaling(work: Path, options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Time and memory of the main pair against size."""
    sizes = [("20b", n) for n in (1, 2, 4, 8)] + [("20b", 24)] * options.full + [("120b", 2)]
    found: dict[str, dict[str, Any]] = {}
    for model, layers in sizes:
        source, target = _synth(work / "scaling", model, layers), work / "target"
        found[f"{model}, {layers} layers"] = measure(
            "convert", str(source), str(target), "hf", "bf16"
        )
        remove(target)
        remove(source)
    return found


RATIOS = (
    *(
        (f"{a} -> {b}: speed of I/O alone", f"{a} -> {b}, I/O alone", f"{a} -> {b}")
        for a in FORMATS
        for b in FORMATS
        if a != b
    ),
    ("time of dd for the same bytes", "dd direct, write the BF16 bytes", "hf-mxfp4 -> hf-bf16"),
    ("time against cp + fsync", "hf-mxfp4 -> hf-bf16", "cp + fsync of the BF16 output"),
    ("time without digests", "hf-mxfp4 -> hf-bf16, no digests", "hf-mxfp4 -> hf-bf16"),
    (
        "values-verify: speed of reading alone",
        "verify values, reading alone",
        "verify values, hf-mxfp4 and hf-bf16",
    ),
    (
        "times as fast as transformers",
        "2 layers: transformers load + save",
        "2 layers: hf-mxfp4 -> hf-bf16",
    ),
)
"""(what it says, numerator, denominator): ratios of seconds within one round."""


def table(rounds: Rounds) -> str:
    """Medians with their spread, then ratios."""
    rows = [f"{'case':<44}{'median s':>9}{'min':>8}{'max':>8}{'GB/s':>7}{'peak MB':>9}{'cpu s':>7}"]
    for name, results in rounds.items():
        seconds = sorted(result["seconds"] for result in results)
        middle = statistics.median(seconds)
        moved = (results[0]["read"] + results[0]["written"]) / middle / 1e9
        peak = max(result["peak_rss"] for result in results) / 1e6
        cpu = statistics.median(result["cpu"] for result in results)
        rows.append(
            f"{name:<44}{middle:>9.2f}{seconds[0]:>8.2f}{seconds[-1]:>8.2f}{moved:>7.2f}"
            f"{peak:>9.0f}{cpu:>7.1f}"
        )
    rows += ["", f"{'ratio, within each round':<52}{'median':>8}{'min':>7}{'max':>7}"]
    for what, top, bottom in RATIOS:
        if top in rounds and bottom in rounds:
            pairs = zip(rounds[top], rounds[bottom], strict=True)
            ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
            middle = statistics.median(ratios)
            rows.append(f"{what:<52}{middle:>8.2f}{ratios[0]:>7.2f}{ratios[-1]:>7.2f}")
    return "\n".join(rows)


def scaling_table(scaling: dict[str, dict[str, Any]]) -> str:
    """Seconds, rate and memory by size."""
    rows = [f"{'size':<20}{'seconds':>9}{'GB written':>12}{'GB/s':>7}{'peak MB':>9}"]
    for name, one in scaling.items():
        gigabytes = one["written"] / 1e9
        rate = (one["read"] + one["written"]) / one["seconds"] / 1e9
        peak = one["peak_rss"] / 1e6
        rows.append(f"{name:<20}{one['seconds']:>9.2f}{gigabytes:>12.2f}{rate:>7.2f}{peak:>9.0f}")
    return "\n".join(rows)


def _machine(work: Path) -> dict[str, Any]:
    models = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
    }


if __name__ == "__main__":
    main()

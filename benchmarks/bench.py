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
import shutil
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.cases import measure, remove
from gptoss_convert.machine.small_files import pieces, write_file
from gptoss_convert.synth.synth import plan_synth

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
    if options.only:
        cases = {name: case for name, case in cases.items() if any(p in name for p in options.only)}
    rounds: Rounds = defaultdict(list)
    result = {"machine": _machine(work), "layers": options.layers, "rounds": rounds}
    for number in range(options.rounds):
        for name in random.Random(number).sample(sorted(cases), len(cases)):
            try:
                rounds[name].append(measure(*cases[name]))
            except subprocess.CalledProcessError as error:
                print(f"{name}: failed, left out: {error}", file=sys.stderr)
                del cases[name]
                rounds.pop(name, None)
                continue
            finally:
                for left in (work / "target", *work.glob(".target*")):
                    remove(left)
            seconds = rounds[name][-1]["seconds"]
            print(f"round {number + 1}  {name:<40} {seconds:8.2f} s", file=sys.stderr)
        # After every round: what has been measured is kept if a later one is stopped.
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(rounds))
    if not options.keep:
        for source in sources.values():
            remove(source)
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
    parser.add_argument(
        "--ram-disk", type=Path, help="a folder in memory, to measure writing alone"
    )
    parser.add_argument("--only", nargs="+", help="cases with one of these words in their names")
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


def _headers_of(path: Path, model: str) -> Path:
    """A full-size checkpoint without its weights: enough for plans."""
    if not path.exists():
        image = plan_synth(path, model=model).image
        for file in image.files:
            path.mkdir(parents=True, exist_ok=True)
            with (path / file.name).open("wb") as stream:
                for offset, content in file.fixed:
                    stream.seek(offset)
                    stream.write(content)
                stream.truncate(file.size)
        for name, content in image.closing:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(path, name, pieces(content, {}))
    return path


def _sources(work: Path, options: argparse.Namespace) -> dict[str, Path]:
    """The same model in all four formats, and what some cases need besides."""
    sources = {"hf-mxfp4": _synth(work / "hf-mxfp4", "20b", options.layers)}
    for name in ("hf-bf16", "openai", "megatron"):
        sources[name] = work / name
        if not sources[name].exists():
            measure("convert", str(sources["hf-mxfp4"]), str(sources[name]), *FORMATS[name])
    sources["120b"] = _headers_of(work / "120b", "120b")
    if options.ram_disk:
        sources["ram disk"] = options.ram_disk / "hf-mxfp4"
        shutil.copytree(sources["hf-mxfp4"], sources["ram disk"], dirs_exist_ok=True)
    if options.peers:
        sources["peers"] = _synth(work / "peers", "20b", 2)
        os.environ.setdefault("BRIDGE_WHEEL", _bridge_wheel(work / "wheels"))
    return sources


def _bridge_wheel(folder: Path) -> str:
    """Megatron-Bridge's wheel from the package index, "" without one; it is read, not installed."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    subprocess.run([*download, ":all:", "--dest", str(folder), "megatron-bridge"], check=False)
    return next(map(str, sorted(folder.glob("megatron_bridge-*.whl"))), "")


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
    mxfp4, bf16 = str(sources["hf-mxfp4"]), str(sources["hf-bf16"])
    nbytes = _size(sources["hf-bf16"])
    cases[f"{MAIN}, no digests"] = ("convert", mxfp4, target, "hf", "bf16", "digests")
    cases[DD_WRITE] = ("write_limit", target, nbytes)
    cases["dd direct, read the MXFP4 bytes"] = ("read_limit", mxfp4)
    cases[DD_BOTH] = ("both_limits", mxfp4, target, nbytes)
    cases[CP] = ("copy", bf16, target)
    cases[VALUES] = ("verify", mxfp4, bf16)
    cases[f"{VALUES}, reading alone"] = ("verify", mxfp4, bf16, "kernels")
    cases[KERNELS] = ("kernels", "5")
    cases |= _start_up(str(sources["120b"]), target)
    if "ram disk" in sources:
        cases[FROM_RAM] = ("convert", str(sources["ram disk"]), target, "megatron", "keep")
        cases[DD_DISTCP] = ("write_limit", target, _size(sources["megatron"]))
    if options.peers:
        peer = str(sources["peers"])
        cases[PEER] = ("transformers", peer, target)
        cases[f"2 layers: {MAIN}"] = ("convert", peer, target, "hf", "bf16")
        cases[DCP] = ("dcp", target, "4")
    return cases


def _start_up(checkpoint: str, target: str) -> dict[str, tuple[str, ...]]:
    """What passes before the first byte is read, on a checkpoint of full size."""
    needed = (
        "from gptoss_convert.codecs.mxfp4 import library\n"
        "from gptoss_convert.conversion import run\n"
        "library.load()"
    )
    return {
        "--help": ("python", "-m", "gptoss_convert", "--help"),
        "inspect 120b": ("python", "-m", "gptoss_convert", "inspect", checkpoint),
        "plan 120b": ("planning", checkpoint, target),
        "import what convert needs": ("python", "-c", needed),
    }


def _size(folder: Path) -> str:
    return str(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))


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


MAIN = "hf-mxfp4 -> hf-bf16"
DD_WRITE = "dd direct, write the BF16 bytes"
DD_BOTH = "dd direct, read MXFP4 and write BF16 at once"
CP = "cp + fsync of the BF16 output"
VALUES = "verify values, hf-mxfp4 and hf-bf16"
FROM_RAM = "hf-mxfp4 on a RAM disk -> megatron"
DD_DISTCP = "dd direct, write the Megatron bytes"
PEER = "2 layers: transformers load + save"
DCP = "DCP, default writer"
KERNELS = "kernels, one thread"


Figure = Callable[[dict[str, Any]], float]


def _seconds(result: dict[str, Any]) -> float:
    return result["seconds"]


def _pace(result: dict[str, Any]) -> float:
    return result["seconds"] / result["written"]


def _memory(result: dict[str, Any]) -> float:
    return result["peak_rss"]


def _kernel(name: str) -> Figure:
    return lambda result: statistics.median(result["kernels"][name])


@dataclass(frozen=True)
class Ratio:
    """One case's figure over another's, within a round, and what it should come to."""

    what: str
    over: str
    under: str
    goal: str
    figure: Figure = _seconds
    figure_under: Figure | None = None
    """Of the other case; the same unless it is given."""

    def row(self, rounds: Rounds) -> str:
        pairs = zip(rounds[self.over], rounds[self.under], strict=True)
        ratios = sorted(self.figure(a) / (self.figure_under or self.figure)(b) for a, b in pairs)
        middle = statistics.median(ratios)
        met = (
            middle >= float(self.goal[2:])
            if self.goal[0] == ">"
            else middle <= float(self.goal[2:])
        )
        spread = f"{middle:>8.2f}{ratios[0]:>7.2f}{ratios[-1]:>7.2f}"
        return f"{self.what:<66}{spread}  {self.goal:>7}  {'met' if met else 'missed'}"


RATIOS = (
    *(
        Ratio(f"{a} -> {b}: speed of I/O alone", f"{a} -> {b}, I/O alone", f"{a} -> {b}", ">=0.9")
        for a in FORMATS
        for b in FORMATS
        if a != b
    ),
    Ratio("speed of dd that writes the same bytes", DD_WRITE, MAIN, ">=0.95"),
    Ratio("speed of dd that reads and writes the same", DD_BOTH, MAIN, ">=0.95"),
    Ratio("time of cp + fsync", MAIN, CP, "<=0.7"),
    Ratio("speed without digests", f"{MAIN}, no digests", MAIN, ">=0.92"),
    Ratio("values-verify: speed of reading alone", f"{VALUES}, reading alone", VALUES, ">=0.95"),
    Ratio(".distcp: speed of dd", DD_DISTCP, FROM_RAM, ">=0.9"),
    Ratio(".distcp: times as fast as DCP", DCP, FROM_RAM, ">=2.5", _pace),
    Ratio("2 layers: times as fast as transformers", PEER, f"2 layers: {MAIN}", ">=20"),
    Ratio("2 layers: memory of transformers", f"2 layers: {MAIN}", PEER, "<=0.05", _memory),
)
KERNEL_RATIOS = (
    ("copy", "decode, straight", ">=1.0"),
    ("copy", "decode, across", ">=0.45"),
    ("copy", "encode, straight", ">=0.45"),
    ("copy", "encode, across", ">=0.45"),
    ("copy", "relayout, transpose and split", ">=0.3"),
    ("copy", "relayout, join and transpose", ">=0.3"),
    ("Megatron-Bridge decode, straight", "decode, straight", ">=100"),
    ("transformers decode, across", "decode, across", ">=50"),
    ("Megatron-Bridge encode, straight", "encode, straight", ">=70"),
)
"""Whose time over whose, and the goal; the peers' where they are installed."""


def table(rounds: Rounds) -> str:
    """Medians with their spread, then ratios."""
    rows = [
        f"{'case':<44}{'median s':>9}{'min':>8}{'max':>8}{'GB/s':>7}{'written':>8}"
        f"{'peak MB':>9}{'cpu s':>7}"
    ]
    for name, results in rounds.items():
        seconds = sorted(result["seconds"] for result in results)
        middle = statistics.median(seconds)
        moved = (results[0]["read"] + results[0]["written"]) / middle / 1e9
        written = results[0]["written"] / middle / 1e9
        peak = max(result["peak_rss"] for result in results) / 1e6
        cpu = statistics.median(result["cpu"] for result in results)
        rows.append(
            f"{name:<44}{middle:>9.2f}{seconds[0]:>8.2f}{seconds[-1]:>8.2f}{moved:>7.2f}"
            f"{written:>8.2f}{peak:>9.0f}{cpu:>7.1f}"
        )
    rows += ["", f"{'ratio, within each round':<66}{'median':>8}{'min':>7}{'max':>7}  goal"]
    rows += [one.row(rounds) for one in RATIOS if one.over in rounds and one.under in rounds]
    kernels = rounds[KERNELS][0]["kernels"] if KERNELS in rounds else {}
    for over, under, goal in KERNEL_RATIOS:
        if over in kernels:
            what = f"{under}: {'speed of' if over == 'copy' else 'times as fast as'} {over}"
            one = Ratio(what, KERNELS, KERNELS, goal, _kernel(over), _kernel(under))
            rows.append(one.row(rounds))
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

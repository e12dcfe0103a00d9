"""verify on one GPU and on several of one machine: wall time, memory by rank, equal reports.

Run `python -m benchmarks.gpu_ranks FOLDER --out OUT --seconds 480`, FOLDER on a RAM disk with room
for both sides of the largest model: 56 GB for the 20b, 130 GB for the 120b; `--target-folder`
holds the second side elsewhere. Everything is generated on the spot; nothing is downloaded. What
would start too late is left out; OUT/ranks.json holds everything, a short table comes last.
`--device cpu --models tiny` rehearses it all without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SECOND_SIDE = {"tiny": "megatron", "20b": "megatron", "120b": "openai"}
"""The format that hf-mxfp4 is held against."""
SECONDS_EXPECTED = {("20b", 1): 115, ("20b", 2): 87, ("120b", 1): 300, ("120b", 2): 200}
ELSEWHERE = ("seconds", "gpu_memory_bytes", "gpu_memory_by_rank")
"""Keys of a report that may depend on how many ranks wrote it."""


@dataclass
class Bench:
    """Where files go, how long all may take, and what was measured so far."""

    sides: tuple[Path, Path]
    out: Path
    device: str
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)

    def left(self) -> float:
        return self.deadline - time.monotonic()

    def note(self, name: str, text: str, content: object = None) -> None:
        print(f"{name:<16} {text}", flush=True)
        self.rows.append(f"{name:<16} {text}")
        self.results[name] = content if content is not None else text
        (self.out / "ranks.json").write_text(json.dumps(self.results, indent=1))


def run(bench: Bench, *words: str, gpus: int = 0) -> tuple[int, str, float]:
    """Exit status, output and seconds of a command of the program, by torchrun if so wished."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(gpus)]
    line = [sys.executable, *(launcher if gpus > 1 else []), "-m", "gptoss_convert", *words]
    # On a CPU the bits depend on the number of threads; torchrun would choose one.
    threads = {"OMP_NUM_THREADS": "1"} if bench.device == "cpu" else {}
    began = time.monotonic()
    running = subprocess.Popen(
        line,
        env={**os.environ, **threads},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = running.communicate(timeout=max(bench.left(), 1))
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)  # the ranks too
        raise
    return running.returncode, said, time.monotonic() - began


def generate(bench: Bench, model: str) -> None:
    """Both sides at once, each on half of the processors."""
    began = time.monotonic()
    formats = ("hf", SECOND_SIDE[model])
    workers = str(max(len(os.sched_getaffinity(0)) // 2, 1))
    running = []
    for folder, form in zip(bench.sides, formats, strict=True):
        line = [sys.executable, "-m", "gptoss_convert", "synth", str(folder), "--model", model]
        line += ["--format", form, "--workers", workers, "--quiet"]
        running.append(subprocess.Popen(line))
    if any(one.wait() for one in running):
        raise RuntimeError(f"synth of {model} failed")
    size = sum(p.stat().st_size for side in bench.sides for p in side.rglob("*") if p.is_file())
    seconds = time.monotonic() - began
    bench.note(f"{model} synth", f"{size / 1e9:.1f} GB in {seconds:.1f} s")


def verify(bench: Bench, model: str, gpus: int, more: list[str]) -> dict[str, Any]:
    """What `verify` reports on so many GPUs."""
    file = bench.out / f"{model}-{gpus}.json"
    words = ["verify", *map(str, bench.sides), "--device", bench.device, "--json", str(file)]
    file.unlink(missing_ok=True)
    status, said, wall = run(bench, *words, "--max-memory", "16GB", *more, gpus=gpus)
    if not file.exists():
        raise RuntimeError(f"status {status}: {said[-1500:]}")
    report = json.loads(file.read_text())
    levels = {level["name"]: level for level in report["levels"]}
    logits = levels["logits"]["numbers"]
    memory = ", ".join(f"{peak / 2**30:.1f}" for peak in logits["gpu_memory_by_rank"])
    experts = [len(layer["cold_experts"]) for layer in logits["layers"]]
    text = (
        f"same {report['same']}  max|d| {logits['overall']['max_delta']:g}  "
        f"{logits['overall']['positions']} positions  {sum(experts)} cold experts  "
        f"wall {wall:.1f} s  values {levels['values']['seconds']:.1f} s  "
        f"logits {levels['logits']['seconds']:.1f} s  GPU {memory} GiB"
    )
    bench.note(f"{model} on {gpus}", text, {"wall": wall, "text": text})
    return report


def without_elsewhere(report: Any) -> Any:
    """A report without what may depend on the number of ranks."""
    if isinstance(report, dict):
        return {k: without_elsewhere(v) for k, v in report.items() if k not in ELSEWHERE}
    if isinstance(report, list):
        return [without_elsewhere(one) for one in report]
    return report


KILLED = """
import os, signal, sys, time
from gptoss_convert.__main__ import main
from gptoss_convert.witness import observe

note = observe._Batch.note
def noted(self, ours, *words):
    if ours.layer == 1 and os.environ["RANK"] == "1":
        open(sys.argv[-1] + ".killed", "w").write(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)
    note(self, ours, *words)

observe._Batch.note = noted
main()
"""


def killed(bench: Bench, model: str, gpus: int) -> None:
    """How long the others live once a rank is killed in the middle of the logits."""
    script, out = bench.out / "killed.py", bench.out / "killed.json"
    script.write_text(KILLED)
    words = ["verify", *map(str, bench.sides), "--device", bench.device, "--layers", "3"]
    words += ["--sample", "20000", "--json", str(out)]
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    line += [str(gpus), str(script), *words]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=bench.left())
    seconds = time.time() - float((bench.out / "killed.json.killed").read_text())
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    text = f"status {done.returncode}, all ended {seconds:.1f} s later: {'; '.join(said)}"
    bench.note(f"{model} killed", text)


def measure(bench: Bench, model: str, gpus: list[int], more: list[str]) -> bool:
    """One model on each number of GPUs; whether all reports are equal."""
    generate(bench, model)
    reports = {}
    for count in gpus:
        if bench.left() < SECONDS_EXPECTED.get((model, count), 0):
            bench.note(f"{model} on {count}", f"not run, {bench.left():.0f} s are left")
            continue
        reports[count] = verify(bench, model, count, more)
    plain = [json.dumps(without_elsewhere(one)) for one in reports.values()]
    equal = all(one == plain[0] for one in plain)
    walls = {n: bench.results[f"{model} on {n}"]["wall"] for n in reports}
    if len(plain) > 1:
        ratio = walls[min(walls)] / walls[max(walls)]
        seconds = {
            n: next(one for one in r["levels"] if one["name"] == "logits")["seconds"]
            for n, r in reports.items()
        }
        logits = seconds[min(seconds)] / seconds[max(seconds)]
        text = f"reports equal: {equal}  wall {ratio:.2f} times as fast, logits {logits:.2f} times"
        bench.note(f"{model} together", text)
    if max(gpus) > 1 and bench.left() > 40:
        killed(bench, model, max(gpus))
    for side in bench.sides:
        shutil.rmtree(side)
    return equal


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target-folder", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=SECOND_SIDE, default=["20b", "120b"])
    parser.add_argument("--gpus", nargs="+", type=int, default=[2, 1])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--more", nargs=argparse.REMAINDER, default=[], help="Options of verify.")
    options = parser.parse_args()
    folders = options.folder, options.target_folder or options.folder
    for folder in (options.out, *folders):
        folder.mkdir(parents=True, exist_ok=True)
    sides = folders[0] / "source", folders[1] / "target"
    bench = Bench(sides, options.out, options.device, time.monotonic() + options.seconds)
    cuda = options.device == "cuda"
    name = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if cuda else "CPU"
    today = time.strftime("%Y-%m-%d")
    bench.note(
        "machine", f"{name}, {os.cpu_count()} processors, torch {torch.__version__}, {today}"
    )
    equal = []
    for model in options.models:
        try:
            equal.append(measure(bench, model, options.gpus, options.more))
        except Exception as error:  # one model that fails must not cost the other its time
            bench.note(f"{model} FAILED", f"{type(error).__name__}: {str(error)[-1500:]}")
            equal.append(False)
            for side in sides:
                shutil.rmtree(side, ignore_errors=True)
    print("\n" + "\n".join(bench.rows), flush=True)
    sys.exit(0 if all(equal) else 1)


if __name__ == "__main__":
    main()

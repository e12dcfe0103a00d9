"""Merging adapters: how far exact sums and PEFT's lie apart, and what a merge costs.

    python -m benchmarks.adapters arithmetic
    python -m benchmarks.adapters merge FOLDER --layers 2 --rank 16

`merge` writes a synthetic 20b of so many layers, an adapter of its attention and one of its experts
to FOLDER, copies it, converts it without and with them, prints times, peak memory and ratios, and
removes what it wrote. It needs no network; all 24 layers take 60 GB in FOLDER. With `--peft
PYTHON`, PEFT merges the same adapters into the same base in BF16, which it holds in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

ROWS, COLUMNS, RANK = 1440, 2880, 16
"""A quarter of one expert's gate_up."""
HIDDEN, INTER, EXPERTS = 2880, 2880, 32
SIDES = {"q": (4096, 2880), "k": (512, 2880), "v": (512, 2880), "o": (2880, 4096)}
TARGETS: dict[str, dict[str, Any]] = {
    "attention": {"target_modules": [f"{p}_proj" for p in SIDES]},
    "experts": {
        "target_modules": [],
        "target_parameters": [f"mlp.experts.{name}_proj" for name in ("gate_up", "down")],
    },
}
CONVERTER = [sys.executable, "-m", "gptoss_convert"]
RATIOS = (
    ("to MXFP4, attention", "to MXFP4, no adapter"),
    ("to MXFP4, attention", "copy"),
    ("to BF16, experts", "to BF16, no adapter"),
)


def arithmetic() -> None:
    """Normal weights of deviation 0.02, an update a tenth as large: errors against float64."""
    from gptoss_convert.engine import sums

    rng = np.random.default_rng(0)
    weights = sums.to_bf16(rng.normal(0, 0.02, (ROWS, COLUMNS)).astype(np.float32))
    p, q = (
        rng.normal(0, 0.0112, side).astype(np.float32) for side in ((ROWS, RANK), (RANK, COLUMNS))
    )
    scale = Fraction(4)
    true = sums.widened(weights) + 4 * (p.astype(np.float64) @ q.astype(np.float64))
    merged = {"exact": weights.copy()}
    sums.add_exact(merged["exact"], p, q, scale)
    for name, twice in (
        ("peft, one rounding (modules)", False),
        ("peft, two roundings (experts)", True),
    ):
        merged[name] = weights.copy()
        sums.add_as_peft(merged[name], p, q, scale, twice)
    least = np.sqrt(np.mean((sums.widened(merged["exact"]) - true) ** 2))
    for name, made in merged.items():
        error = np.sqrt(np.mean((sums.widened(made) - true) ** 2)) / least
        other = np.mean(made != merged["exact"])
        print(f"{name:32} rms error {error:.3f}, other than exact {other:.4%}")


def attention(rank: int, layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names and shapes of the attention's halves, in PEFT's layout."""
    for layer in range(layers):
        for p, (rows, columns) in SIDES.items():
            stem = f"base_model.model.model.layers.{layer}.self_attn.{p}_proj"
            yield f"{stem}.lora_A.weight", (rank, columns)
            yield f"{stem}.lora_B.weight", (rows, rank)


def experts(rank: int, layers: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """The same of both expert parameters."""
    ranks = EXPERTS * rank
    for layer in range(layers):
        stem = f"base_model.model.model.layers.{layer}.mlp.experts"
        yield f"{stem}.base_layer.lora_A.weight", (ranks, HIDDEN)
        yield f"{stem}.base_layer.lora_B.weight", (2 * INTER, ranks)
        yield f"{stem}.lora_A.weight", (ranks, INTER)
        yield f"{stem}.lora_B.weight", (HIDDEN, ranks)


def write_adapter(folder: Path, shapes: Iterator[tuple[str, tuple[int, int]]], rank: int) -> Path:
    """An adapter of random float32 halves."""
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    rng = np.random.default_rng(1)
    tensors = {name: rng.normal(0, 0.01, shape).astype(np.float32) for name, shape in shapes}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    config = {"peft_type": "LORA", "peft_version": "0.18.1", "r": rank, "lora_alpha": 2 * rank}
    config |= TARGETS[folder.name]
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(folder: Path, asked: argparse.Namespace) -> None:
    """Time a copy of the base, conversions without and with the adapters, and PEFT."""
    base, rank, layers = folder / "base", asked.rank, asked.layers
    folder.mkdir(parents=True)
    words = [*CONVERTER, "synth", base, "--model", "20b", "--layers", str(layers), "-q"]
    subprocess.run(words, check=True)
    adapters = {
        None: None,
        "attention": write_adapter(folder / "attention", attention(rank, layers), rank),
        "experts": write_adapter(folder / "experts", experts(rank, layers), rank),
    }
    out = (asked.work or folder) / "out"
    timed: dict[str, list[float]] = {}
    for _ in range(asked.runs):
        timed.setdefault("copy", []).append(copied(base, out))
        for dtype, name in (
            ("keep", None),
            ("keep", "attention"),
            ("bf16", None),
            ("bf16", "experts"),
        ):
            told = converted(base, out, dtype, adapters[name])
            label = f"to {'MXFP4' if dtype == 'keep' else 'BF16'}, {name or 'no adapter'}"
            timed.setdefault(label, []).append(told["seconds"])
            memory = f"{told['peak_memory_bytes'] / 1e6:.0f} MB, {told['workers']} workers"
            print(f"{label:24} {told['seconds']:7.2f} s, {memory}")
    best = {label: min(seconds) for label, seconds in timed.items()}
    for label, other in RATIOS:
        print(f"{label} / {other}: {best[label] / best[other]:.2f}")
    if asked.peft:
        converted(base, folder / "bf16", "bf16", None)
        for name in ("attention", "experts"):
            words = [
                asked.peft,
                "-m",
                "benchmarks.adapters",
                "peft",
                folder / "bf16",
                adapters[name],
                out,
            ]
            subprocess.run(words, check=True)
            shutil.rmtree(out)
    shutil.rmtree(folder)


def copied(base: Path, out: Path) -> float:
    """Seconds of a copy of the base's files, synced as a conversion's are."""
    began = time.monotonic()
    out.mkdir()
    for path in base.iterdir():
        with path.open("rb") as source, (out / path.name).open("wb") as target:
            shutil.copyfileobj(source, target, 16 << 20)
            os.fsync(target.fileno())
    seconds = time.monotonic() - began
    shutil.rmtree(out)
    print(f"{'copy':24} {seconds:7.2f} s")
    return seconds


def converted(base: Path, out: Path, dtype: str, adapter: Path | None) -> dict[str, Any]:
    """The report of a conversion, whose target is removed unless it is needed."""
    words = [*CONVERTER, "convert", base, out, "--to", "hf", "--dtype", dtype, "--json"]
    words += ["--adapter", adapter] if adapter else []
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    if out.name == "out":
        shutil.rmtree(out)
    return json.loads(done.stdout)


def peft(base: str, adapter: str, out: str) -> None:
    """PEFT's own merge, in whichever environment runs this: time of all of it, and peak memory."""
    import resource

    began = time.monotonic()
    import peft  # pyright: ignore[reportMissingImports]
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    loaded = time.monotonic()
    merged = peft.PeftModel.from_pretrained(model, adapter).merge_and_unload()
    made = time.monotonic()
    merged.save_pretrained(out)
    seconds = time.monotonic() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    versions = f"PEFT {peft.__version__}, transformers {transformers.__version__}"
    print(
        f"{versions}, {Path(adapter).name}: {seconds:.1f} s, {made - loaded:.1f} s of it the "
        f"merge, {peak:.0f} MB"
    )


def main() -> None:
    """Print one of the tables, and what it was computed on."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("arithmetic")
    merging = kinds.add_parser("merge")
    merging.add_argument("folder", type=Path, help="a new folder, removed at the end")
    merging.add_argument("--layers", type=int, default=2)
    merging.add_argument("--rank", type=int, default=16)
    merging.add_argument("--runs", type=int, default=1, help="of each; ratios are of the best")
    merging.add_argument("--work", type=Path, help="where targets are written, FOLDER by default")
    merging.add_argument("--peft", help="a Python that has peft, transformers and torch")
    alone = kinds.add_parser("peft")
    for name in ("base", "adapter", "out"):
        alone.add_argument(name)
    asked = parser.parse_args()
    if asked.kind == "peft":
        peft(asked.base, asked.adapter, asked.out)
        return
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} processors, Python {platform.python_version()}")
    if asked.kind == "arithmetic":
        arithmetic()
    else:
        merge(asked.folder, asked)


if __name__ == "__main__":
    main()

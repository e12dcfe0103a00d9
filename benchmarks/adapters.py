"""Merging adapters: how far exact sums and PEFT's lie apart, and what a merge costs.

    python -m benchmarks.adapters arithmetic
    python -m benchmarks.adapters merge FOLDER --layers 2 --rank 16

`merge` writes a synthetic 20b of so many layers, an adapter of its attention and one of its experts
to FOLDER, converts without and with them, prints times and peak memory, and removes what it wrote.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from gptoss_convert.engine import sums

ROWS, COLUMNS, RANK = 1440, 2880, 16
"""A quarter of one expert's gate_up."""
HIDDEN, INTER, EXPERTS = 2880, 2880, 32
SIDES = {"q": (4096, 2880), "k": (512, 2880), "v": (512, 2880), "o": (2880, 4096)}


def arithmetic() -> None:
    """Normal weights of deviation 0.02, an update a tenth as large: errors against float64."""
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
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def merge(folder: Path, layers: int, rank: int) -> None:
    """Conversions without and with the adapters."""
    base = folder / "base"
    command = [sys.executable, "-m", "gptoss_convert"]
    subprocess.run(
        [*command, "synth", base, "--model", "20b", "--layers", str(layers), "-q"], check=True
    )
    adapters = {
        "attention": write_adapter(folder / "attention", attention(rank, layers), rank),
        "experts": write_adapter(folder / "experts", experts(rank, layers), rank),
    }
    for dtype, adapter in (
        ("keep", None),
        ("keep", "attention"),
        ("bf16", None),
        ("bf16", "experts"),
    ):
        out = folder / "out"
        words = [*command, "convert", base, out, "--to", "hf", "--dtype", dtype, "--json"]
        words += ["--adapter", adapters[adapter]] if adapter else []
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        told = json.loads(done.stdout)
        name = f"20b, {layers} layers, MXFP4 to {'MXFP4' if dtype == 'keep' else 'BF16'}"
        print(
            f"{name}, {adapter or 'no adapter':10} {told['seconds']:7.2f} s, "
            f"{told['peak_memory_bytes'] / 1e6:4.0f} MB, {told['workers']} workers"
        )
        shutil.rmtree(out)
    for path in (base, *adapters.values()):
        shutil.rmtree(path)


def main() -> None:
    """Print one of the two tables, and what it was computed on."""
    parser = argparse.ArgumentParser(description=__doc__)
    kinds = parser.add_subparsers(dest="kind", required=True)
    kinds.add_parser("arithmetic")
    merging = kinds.add_parser("merge")
    merging.add_argument("folder", type=Path)
    merging.add_argument("--layers", type=int, default=2)
    merging.add_argument("--rank", type=int, default=16)
    asked = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    print(f"{platform.machine()}, {cores} processors, Python {platform.python_version()}")
    if asked.kind == "arithmetic":
        arithmetic()
    else:
        merge(asked.folder, asked.layers, asked.rank)


if __name__ == "__main__":
    main()

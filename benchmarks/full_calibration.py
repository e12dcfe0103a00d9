"""How long `--lossy calibrated` takes at full size, and in how much memory.

Run `python -m benchmarks.full_calibration FOLDER --model 20b`, FOLDER on a fast disk or RAM disk
with room for the model as BF16 and twice as MXFP4. Weights are synthetic, and tuned by noise of
2 % of their size; `--layers` takes the first so many.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

from gptoss_convert.containers import safetensors

NOISE = 0.02
LAYERS = {"tiny": 4, "20b": 24, "120b": 36}


def main() -> None:
    """Make a tune, convert it, print a line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="made if need be")
    parser.add_argument("--model", choices=LAYERS, default="20b")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=131072)
    parser.add_argument("--vocab", type=int, default=201088)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    base, tuned, out = (options.folder / name for name in ("base", "tuned", "out"))
    began = time.monotonic()
    size = ["--layers", str(options.layers)] if options.layers else []
    _run("synth", base, "--model", options.model, *size, "--shards", "size")
    _run("convert", base, tuned, "--to", "hf", "--dtype", "bf16", "--no-scales")
    _tune(tuned)
    text = options.folder / "tokens.jsonl"
    rng = np.random.default_rng(0)
    lines = rng.integers(0, options.vocab, (options.tokens // 2048, 2048)).tolist()
    text.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    print(f"made a tune of {options.model} in {time.monotonic() - began:.0f} s", flush=True)
    began = time.monotonic()
    words = ("--to", "hf", "--dtype", "mxfp4", "--lossy", "calibrated", "--calibrate", text)
    done = json.loads(_run("convert", tuned, out, *words, "--scales", base, "--json"))
    seconds = time.monotonic() - began
    found = done["calibration"]
    layers = options.layers or LAYERS[options.model]
    whole = LAYERS[options.model]
    kept = [v for one in found["matrices"] for v in one["kept"] if v is not None]
    each = found["seconds"] / layers
    print(
        f"{options.model}, {layers} of {whole} layers, {found['tokens']} tokens and "
        f"{found['held_out']} held out, on {found['device']}: {seconds:.0f} s in all, calibration "
        f"{found['seconds']:.0f} s, {each:.1f} s a layer, so {each * whole:.0f} s for {whole}; GPU "
        f"{found['gpu_memory_bytes'] / 2**30:.1f} GiB, host {done['peak_memory_bytes'] / 1e9:.1f} "
        f"GB; kept {sum(kept) / len(kept):.3f}, KL {found['kl']:.4g}",
        flush=True,
    )


def _run(*words: object) -> str:
    command = [sys.executable, "-m", "gptoss_convert", *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return done.stdout.decode()


def _tune(folder: Path) -> None:
    """Add noise to every expert's weight, in place."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chunks, _ = safetensors.read_directory(folder)
    for chunk in chunks:
        if chunk.tensor.endswith(("gate_up_proj", "down_proj")):
            held = np.memmap(folder / chunk.file, np.int16, "r+", chunk.offset, chunk.shape)
            for expert in held:
                values = torch.from_numpy(expert).view(torch.bfloat16).to(device).float()
                values += torch.randn_like(values) * (NOISE * values.square().mean().sqrt())
                expert[:] = values.to(torch.bfloat16).view(torch.int16).cpu().numpy()


if __name__ == "__main__":
    main()

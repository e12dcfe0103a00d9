"""Speed of the kernels on one expert, as ratios to a memory copy of its BF16 bytes.

Run `python -m benchmarks.kernels [rounds]`: one thread and its CPU time; in each round every
variant runs once, in random order, and the ratios are taken within the round. With transformers
installed, its function for the same job runs too; with a wheel of megatron-bridge
(`pip download --no-deps`) named in BRIDGE_WHEEL, the one that Megatron-Bridge decodes with. Its
release 0.3.1 has none that encodes; BRIDGE_QUANTIZATION may name a copy of the unreleased module
quantization_utils.py that has.
"""

from __future__ import annotations

import ast
import math
import os
import random
import statistics
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gptoss_convert.codecs.mxfp4 import CODEC, relayout
from gptoss_convert.codecs.mxfp4 import codec as mxfp4
from gptoss_convert.engine.fingerprint import fingerprint, packed_fingerprint

INTER, HIDDEN = 2880, 2880
ROWS, GROUPS = 2 * INTER, HIDDEN // 32

Call = Callable[[], object]


def peer(blocks: np.ndarray, scales: np.ndarray) -> dict[str, Call]:
    try:
        import torch
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors
    except ImportError as error:
        print(f"not measured: transformers ({error})", file=sys.stderr)
        return {}
    torch.set_num_threads(1)
    b, s = torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None]
    return {"transformers decode, across": lambda: convert_moe_packed_tensors(b, s)}


def bridge(blocks: np.ndarray, scales: np.ndarray, values: np.ndarray) -> dict[str, Call]:
    """Megatron-Bridge's functions, taken out of its files: the package needs a GPU to import."""
    import torch

    torch.set_num_threads(1)
    found: dict[str, Call] = {}
    b, s = torch.from_numpy(blocks), torch.from_numpy(scales)
    if wheel := os.environ.get("BRIDGE_WHEEL"):
        text = zipfile.ZipFile(wheel).read("megatron/bridge/models/gpt_oss/gpt_oss_bridge.py")
        decode = _function(text, "_dequantize_mxfp4")
        found["Megatron-Bridge decode, straight"] = lambda: decode(b, s)
    else:
        print("not measured: Megatron-Bridge's decoding (BRIDGE_WHEEL is not set)", file=sys.stderr)
    if module := os.environ.get("BRIDGE_QUANTIZATION"):
        encode = _function(Path(module).read_bytes(), "quantize_mxfp4_e2m1_like_scale")
        bits = torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        found["Megatron-Bridge encode, straight"] = lambda: encode(bits, s)
    else:
        print("not measured: Megatron-Bridge's encoding (BRIDGE_QUANTIZATION)", file=sys.stderr)
    return found


def _function(text: bytes, name: str) -> Any:
    """A function of a module, with the module's plain constants, compiled alone."""
    import torch

    kept: list[ast.stmt] = [
        node
        for node in ast.parse(text).body
        if (isinstance(node, ast.FunctionDef) and node.name == name)
        or (isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    ]
    scope: dict[str, Any] = {"torch": torch, "math": math}
    exec(compile(ast.Module(kept, []), name, "exec"), scope)
    return scope[name]


def variants() -> dict[str, Call]:
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 256, (ROWS, GROUPS, 16), dtype=np.uint8)
    scales = rng.integers(110, 125, (ROWS, GROUPS), dtype=np.uint8)
    straight = np.zeros((ROWS, HIDDEN), np.uint16)
    across = np.zeros((HIDDEN, ROWS), np.uint16)
    halves = np.zeros((2, INTER, HIDDEN), np.uint16)
    room = np.zeros_like(straight)
    packed, exponents = np.zeros_like(blocks), np.zeros_like(scales)
    mxfp4.decode(blocks, scales, straight)
    mxfp4.decode(blocks, scales, across.T)
    pairs = across.reshape(HIDDEN, INTER, 2).transpose(2, 1, 0)
    normal = rng.normal(size=straight.shape).astype(np.float32)
    rounded = np.zeros_like(straight)
    relayout.cast(normal, rounded)
    box, lengths = ((0, ROWS), (0, HIDDEN)), (ROWS, HIDDEN)
    split = halves.transpose(1, 0, 2), (INTER, 2, GROUPS)
    return {
        "copy": lambda: np.copyto(room, straight),
        "decode, straight": lambda: mxfp4.decode(blocks, scales, straight),
        "decode, straight, gate and up apart": lambda: mxfp4.decode(
            blocks.reshape(*split[1], 16), scales.reshape(split[1]), split[0]
        ),
        "decode, across": lambda: mxfp4.decode(blocks, scales, across.T),
        "encode, straight": lambda: mxfp4.encode(straight, packed, exponents),
        "encode, straight, hints": lambda: mxfp4.encode(straight, packed, exponents, scales),
        "encode, straight, every block rounded": lambda: mxfp4.encode(rounded, packed, exponents),
        "encode, across": lambda: mxfp4.encode(across.T, packed, exponents),
        "encode, across, hints": lambda: mxfp4.encode(across.T, packed, exponents, scales),
        "relayout, transpose and split": lambda: relayout.copy(pairs, halves),
        "relayout, join and transpose": lambda: relayout.copy(halves, pairs),
        "fingerprint": lambda: fingerprint(straight, box, lengths, -1),
        "fingerprint of MXFP4": lambda: packed_fingerprint(
            CODEC, {"blocks": blocks, "scales": scales}, box, lengths, -1
        ),
        **peer(blocks, scales),
        **bridge(blocks, scales, straight),
    }


def measured(rounds: int) -> dict[str, list[float]]:
    """Processor seconds of each variant, one a round; a round before them warms up."""
    calls = variants()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name in random.sample(list(calls), len(calls)):
            begin = time.thread_time()
            calls[name]()
            if turn:
                seconds[name].append(time.thread_time() - begin)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    gigabytes = ROWS * HIDDEN * 2 / 1e9
    rows = [f"{'':38} GB/s of BF16 min/med/max      x copy min/med/max"]
    for name, spent in seconds.items():
        rates = sorted(gigabytes / value for value in spent)
        ratios = sorted(c / s for c, s in zip(seconds["copy"], spent, strict=True))
        cells = [
            f"{row[0]:6.2f} {statistics.median(row):6.2f} {row[-1]:6.2f}" for row in (rates, ratios)
        ]
        rows.append(f"{name:38} {cells[0]}          {cells[1]}")
    return "\n".join(rows)


if __name__ == "__main__":
    print(table(measured(int(sys.argv[1]) if len(sys.argv) > 1 else 9)))

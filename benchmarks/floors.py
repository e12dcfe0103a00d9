"""The floors of limits.toml that tiny models give: `python -m benchmarks.floors`, on a CPU.

Six models: two shapes, each as HF BF16, HF MXFP4 and Megatron, over the token set. The shared
forward pass in float32 is held against the ecosystem's own model, against itself with other
attention blocks, and against itself in bfloat16.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from gptoss_convert.containers.torch_dist import read
from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.megatron import MegatronReader
from gptoss_convert.witness.megatron_oracle import megatron_logits
from gptoss_convert.witness.oracles import transformers_logits
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.tokens import token_set
from gptoss_convert.witness.walk import Prompts, State, all_logits, walk
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4, write_megatron
from tests.tiny_models import DISTINCT, SQUARE, random_weights

CPU = torch.device("cpu")
LONGEST = 256
OTHER_BLOCKS = Numerics(score_elements=1 << 12)


def models(folder: Path) -> Iterator[tuple[str, Reader, list[list[int]], Tensor]]:
    """Each model with its prompts and the logits `[T, V]` of its ecosystem's own code."""
    for name, shape in (("distinct", DISTINCT), ("square", SQUARE)):
        weights, hf = random_weights(shape, seed=1), folder / name
        for kind, write in (("bf16", write_hf_bf16), ("mxfp4", write_hf_mxfp4)):
            reader = HfReader(write(hf / kind, shape, weights), CPU)
            prompts = [list(one.tokens) for one in token_set(reader.config, LONGEST, 0)]
            found = transformers_logits(hf / kind, prompts, CPU)
            yield f"{name} {kind}", reader, prompts, torch.cat(found)
        config = HfReader(hf / "mxfp4", CPU).config
        iteration = write_megatron(hf / "mcore" / "iter_0000001", shape, weights)
        reader = MegatronReader(iteration, read(iteration).chunks, config, CPU)
        prompts = [list(one.tokens) for one in token_set(config, LONGEST, 0)]
        found = megatron_logits(iteration, config, prompts, CPU)
        yield f"{name} megatron", reader, prompts, torch.cat(found)


def states(reader: Reader, prompts: Prompts, numerics: Numerics) -> list[State]:
    with forward.exact_products():
        walked = walk(reader, [prompts], numerics)
        return [replace(state, values=[*state.values]) for state in walked]


def layer_distance(ours: list[State], theirs: list[State]) -> str:
    pairs = list(zip(ours, theirs, strict=True))
    error = max(metrics.divergence(a.values[0], b.values[0]).worst for a, b in pairs)
    chosen = [(a.chosen[0], b.chosen[0]) for a, b in pairs if a.chosen]
    agreement = min(int(metrics.same_choices(a, b)) / len(a) for a, b in chosen)
    return f"relative error {error:.2g}, routing agreement {agreement:.3f}"


def logit_distance(ours: Tensor, theirs: Tensor) -> str:
    scores = metrics.score(theirs.float(), ours.float(), torch.full((len(ours),), -1))
    kl = f"KL max {float(scores.kl.max()):.2g} mean {float(scores.kl.mean()):.2g}"
    return f"max abs Δlogit {float(scores.max_delta.max()):.2g}, {kl}"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, reader, sequences, oracle in models(Path(folder)):
            prompts = Prompts.of(sequences, CPU)
            exact, coarse = Numerics(), Numerics(dtype=torch.bfloat16)
            ours = all_logits(reader, prompts, exact)
            rounded = all_logits(reader, prompts, coarse)
            clean = states(reader, prompts, exact)
            blocks = layer_distance(clean, states(reader, prompts, OTHER_BLOCKS))
            bf16 = layer_distance(clean, states(reader, prompts, coarse))
            print(f"{name}, {len(ours)} positions, std {float(oracle.std()):.2f}", flush=True)
            print(f"  oracle       {logit_distance(ours, oracle)}", flush=True)
            print(f"  other blocks {blocks}", flush=True)
            print(f"  bfloat16     {logit_distance(rounded, ours)}, {bf16}", flush=True)


if __name__ == "__main__":
    main()

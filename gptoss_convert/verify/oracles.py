"""Oracles: the logits that transformers' and megatron-core's own models give for a directory.

They load the directory by themselves and share no line with readers, forward pass or tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


def transformers_logits(
    directory: Path, sequences: Sequence[Sequence[int]], device: torch.device
) -> list[Tensor]:
    """Logits `[S, V]` of each sequence by `GptOssForCausalLM`: eager attention, float32.

    Of an MXFP4 directory transformers before 5.23 computes the experts in bfloat16.
    """
    from transformers import GptOssForCausalLM

    model = GptOssForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    model.to(device).eval()  # pyright: ignore[reportArgumentType]
    with torch.inference_mode():
        return [
            model(torch.tensor([list(sequence)], device=device), use_cache=False).logits[0]
            for sequence in sequences
        ]

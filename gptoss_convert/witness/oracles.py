"""Oracle: the logits that transformers' own model gives for a directory.

It loads the directory by itself and shares no line with readers, forward pass or tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


@contextmanager
def silence() -> Iterator[None]:
    """Within it transformers shows neither bars nor warnings: stderr belongs to the command."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def transformers_logits(
    directory: Path,
    sequences: Sequence[Sequence[int]],
    device: torch.device,
    layers: int | None = None,
) -> list[Tensor]:
    """Logits `[S, V]` of each sequence by `GptOssForCausalLM`: eager attention, float32.

    With `layers`, of a model that ends after so many.

    Of an MXFP4 directory transformers before 5.23 computes the experts in bfloat16.
    """
    from transformers import GptOssConfig, GptOssForCausalLM
    from transformers.utils.quantization_config import Mxfp4Config

    config = GptOssConfig.from_pretrained(directory)
    if layers is not None:
        config.num_hidden_layers = layers
        config.layer_types = (config.layer_types or [])[:layers]
    packed = getattr(config, "quantization_config", None) is not None
    model = GptOssForCausalLM.from_pretrained(
        directory,
        config=config,
        use_safetensors=True,
        # Else a GPU with MXFP4 kernels computes the experts in bfloat16.
        quantization_config=Mxfp4Config(dequantize=True) if packed else None,
        dtype=torch.float32,
        attn_implementation="eager",
        # Straight to the device: the host need not hold the model.
        device_map=device,
    ).eval()
    with torch.inference_mode():
        return [
            model(torch.tensor([list(sequence)], device=device), use_cache=False).logits[0]
            for sequence in sequences
        ]

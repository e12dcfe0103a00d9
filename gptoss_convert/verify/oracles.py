"""Oracles: the logits that transformers' and megatron-core's own models give for a directory.

They load the directory by themselves and share no line with readers, forward pass or tables.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gptoss_convert.errors import UsageError
from gptoss_convert.verify.first_calls import settle_kernels
from gptoss_convert.verify.model import ModelConfig

if TYPE_CHECKING:
    from gptoss_convert.checkpoint import Checkpoint


def oracle_logits(
    checkpoint: Checkpoint,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    device: torch.device,
) -> list[Tensor] | str:
    """What the checkpoint's own ecosystem computes, or why it cannot, in words.

    Raises UsageError if its library is not installed.
    """
    settle_kernels()
    try:
        if checkpoint.format == "hf":
            layers = len(config.sliding)
            with _silence():
                return transformers_logits(checkpoint.root, sequences, device, layers)
        if checkpoint.format == "openai":
            return "(OpenAI's own code is on no package index)"
        if len(config.sliding) < checkpoint.config.num_hidden_layers:
            return "(megatron-core loads all layers or none)"
        from gptoss_convert.verify.megatron_oracle import megatron_logits

        return megatron_logits(checkpoint.root, config, sequences, device)
    except ModuleNotFoundError as error:
        raise UsageError(
            f"--level oracle of {checkpoint.label} needs {error.name}: "
            "pip install 'gptoss-convert[oracles]'"
        ) from error


@contextmanager
def _silence() -> Iterator[None]:
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

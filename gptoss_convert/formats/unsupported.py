"""Directories that look like GPT-OSS weights and are not: recognised by header and named."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import GptossError, InputError, IntegrityError

_PER_EXPERT = re.compile(r"\.mlp\.experts\.(gate_up_projs|down_projs)\.\d+\.")
_COLLAPSED = re.compile(r"(gate_up_proj|down_proj)\$")
_QUANTISED = (
    (re.compile(r"\.(qweight|qzeros|g_idx)$"), "GPTQ or AWQ"),
    (re.compile(r"\.(quant_state|absmax)"), "bitsandbytes"),
    (re.compile(r"\.(weight_packed|weight_scale|weight_scale_inv)$"), "compressed-tensors or FP8"),
)

UNUSABLE_NAMES = (
    "saved by transformers 5.8 to 5.20 after dequantising: the experts of all layers were written "
    "under one name ('gate_up_proj$'), so all but one layer's are lost; convert the original again"
)


def recognise_files(root: Path) -> GptossError | None:
    """What is wrong with a directory, judged by its file names."""
    if (root / "adapter_config.json").exists():
        return InputError(
            f"{root}: a LoRA adapter, not a model; merge it into its base model first"
        )
    if any(root.glob("mp_rank_*")):
        return InputError(f"{root}: Megatron's legacy torch format; supported: torch_dist")
    if any(root.glob("*.gguf")):
        return InputError(f"{root}: a GGUF file; supported: safetensors and torch_dist")
    if any(root.glob("*.incomplete")):
        return IntegrityError(f"{root}: an unfinished download (*.incomplete); run it again")
    if not any(root.glob("*.safetensors")) and any(root.glob("pytorch_model*.bin")):
        return InputError(f"{root}: pickled weights (pytorch_model*.bin) are never loaded")
    return None


def recognise_tensors(where: str, chunks: Iterable[Chunk]) -> GptossError | None:
    """What is wrong with the tensors of a Hugging Face directory, judged by their names."""
    names = [chunk.tensor for chunk in chunks]
    if any(_COLLAPSED.search(name) for name in names):
        return IntegrityError(f"{where}: {UNUSABLE_NAMES}")
    if any(_PER_EXPERT.search(name) for name in names):
        return InputError(
            f"{where}: unsloth's per-expert naming (mlp.experts.gate_up_projs.0); save with "
            "unsloth's save_pretrained_merged in Hugging Face's naming first"
        )
    if any(".lora_A." in name or ".lora_B." in name for name in names):
        return InputError(f"{where}: LoRA weights; merge them into their base model first")
    for pattern, scheme in _QUANTISED:
        if any(pattern.search(name) for name in names):
            return InputError(f"{where}: quantised with {scheme}; supported: MXFP4 and BF16")
    return None

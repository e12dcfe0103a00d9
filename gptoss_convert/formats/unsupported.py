"""Directories that look like GPT-OSS weights and are not: recognised by header and named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import GptossError, InputError, IntegrityError

_COLLAPSED = re.compile(r"(gate_up_proj|down_proj)\$")
_LAYER = "model.layers.0.input_layernorm.weight"
"""A name that every GPT-OSS in Hugging Face's naming has: what stands before it is a prefix."""
_MERGE = "merge them into their base model first"
_SAVE_MODEL = "save the model that is inside with save_pretrained"
_SAVE_HF = "save it in Hugging Face's naming first, as save_pretrained does"


@dataclass(frozen=True)
class Form:
    """Tensors that are no GPT-OSS in a known naming, but have a name: what they are, what helps."""

    pattern: str
    what: str
    remedy: str

    def found(self, names: Sequence[str]) -> str | None:
        """The first name that shows this form."""
        return next((name for name in names if re.search(self.pattern, name)), None)


_FORMS = (
    Form(
        r"\.lora_[AB]\.|\.lora_(embedding|magnitude)|\.modules_to_save\.|\.ia3_|\.vera_|"
        r"\.adapter\.linear_|prompt_embeddings$|trainable_tokens_delta|\.base_layer\.",
        "LoRA weights",
        _MERGE,
    ),
    Form(
        r"\.mlp\.experts\.(gate_up_projs|down_projs)\.\d+\.|\.mlp\.router\.linear\.",
        "unsloth's per-expert naming (mlp.experts.gate_up_projs.0)",
        "save with unsloth's save_pretrained_merged in Hugging Face's naming first",
    ),
    Form(r"\.(qweight|qzeros|g_idx)$", "quantised with GPTQ or AWQ", "supported: MXFP4 and BF16"),
    Form(
        r"\.(quant_state|absmax)",
        "quantised with bitsandbytes, and not as quantization_config says",
        "read: 4 bits (NF4, FP4) with their quant_state",
    ),
    Form(
        r"\.(weight_packed|weight_scale|weight_scale_inv|weight_shape|weight_global_scale)$|"
        r"_weight_scale(_2)?$|[._]input_(global_)?scale$",
        "quantised with compressed-tensors, ModelOpt or FP8, and not as quantization_config says",
        "read: NVFP4, MXFP4 and FP8 whose scales belong to their tensors",
    ),
    Form(
        r"\.([kv]_scale|[kv]_proj\.output_scale)$",
        "scales of an FP8 KV cache beside the weights",
        "leave them to the server: remove these tensors",
    ),
    Form(r"(^|\.)(optimizer|optim)\.|\.exp_avg(_sq)?$", "an optimizer's state", _SAVE_MODEL),
    Form(
        r"\.mlp\.experts\.(experts\.)?\d+\.(gate|up|down)_proj\.",
        "one tensor for each expert, as llm-compressor saves",
        _SAVE_HF,
    ),
    Form(
        r"\.(w13|w2)_(weight|bias|weight_scale)$|\.qkv_proj\.|\.self_attn\.attn\.",
        "vLLM's or SGLang's sharded_state, a rank's own layout",
        "save the model itself in Hugging Face's naming first",
    ),
    Form(r"\.experts\.(gate|up|down)_proj\.(weight|scales|biases|bias)$", "MLX's naming", _SAVE_HF),
    Form(r"^tok_embeddings\.|\.mlp[12]_(weight|bias)_", "torchtitan's naming", _SAVE_HF),
    Form(r"(^|\.)decoder\.layers\.", "Megatron's naming in safetensors", _SAVE_HF),
    Form(r"^(blk\.\d+|token_embd)\.", "llama.cpp's naming", _SAVE_HF),
    Form(
        r"(^|\.)(v_head|value_head|reward_head|rm_head)\.",
        "a value head, as trainers with rewards save",
        "remove these tensors, or save the policy alone",
    ),
    Form(
        r"(^|\.)(score|classifier|qa_outputs|classification_head)\.",
        "a head for classification in place of the vocabulary",
        "no format here has it",
    ),
    Form(
        r"rotary_emb\.|\.attn\.bias$|\.masked_bias$|position_ids$",
        "buffers that are computed and never read",
        "remove these tensors",
    ),
    Form(
        r"\._?(checkpoint_wrapped_module|fsdp_wrapped_module|orig_mod|flat_param)(\.|$)",
        "a training wrapper's names within the model's",
        _SAVE_MODEL,
    ),
    Form(
        r"\.mlp\.(gate|up|down)_proj\.weight$|\.mlp\.gate\.|shared_expert|block_sparse_moe|"
        r"\.self_attn\.[qk]_norm\.|kv_a_proj|kv_b_proj|\.mamba\.|\.linear_attn\.|"
        r"^transformer\.|^gpt_neox\.|^(model\.)?(visual|vision_tower|language_model)\.|"
        r"pre_feedforward_layernorm",
        "tensors of another architecture",
        "supported: gpt_oss",
    ),
)
"""In this order: the first that a tensor shows is told."""


class AdapterError(InputError):
    """A directory is an adapter where a model is expected."""


UNUSABLE_NAMES = (
    "saved by transformers 5.8 to 5.20 after dequantising: the experts of all layers were written "
    "under one name ('gate_up_proj$'), so all but one layer's are lost; convert the original again"
)


def recognise_files(root: Path) -> GptossError | None:
    """What is wrong with a directory, judged by its file names."""
    if (root / "adapter_config.json").exists():
        return AdapterError(
            f"{root}: a LoRA adapter, not a model; name its base as SOURCE, and it as --adapter"
        )
    if any(root.glob("mp_rank_*")):
        return InputError(f"{root}: Megatron's legacy torch format; supported: torch_dist")
    if any(root.glob("model-rank-*-part-*.safetensors")):
        return InputError(
            f"{root}: vLLM's or SGLang's sharded_state (model-rank-*-part-*.safetensors); save the "
            "model itself in Hugging Face's naming first"
        )
    if any(root.glob("adapter_model.*")):
        return InputError(
            f"{root}: LoRA weights (adapter_model.*), not a model; name their base as SOURCE, and "
            "this, with its adapter_config.json, as --adapter"
        )
    if any(root.glob("*.gguf")):
        return InputError(f"{root}: a GGUF file; supported: safetensors and torch_dist")
    if any(root.glob("*.incomplete")):
        return IntegrityError(f"{root}: an unfinished download (*.incomplete); run it again")
    if not any(root.glob("*.safetensors")) and any(root.glob("pytorch_model*.bin")):
        return InputError(f"{root}: pickled weights (pytorch_model*.bin) are never loaded")
    return None


def recognise_tensors(where: str, chunks: Iterable[Chunk]) -> GptossError | None:
    """What is wrong with the tensors of a Hugging Face directory, judged by their names."""
    names = sorted({chunk.tensor for chunk in chunks})
    if any(_COLLAPSED.search(name) for name in names):
        return IntegrityError(f"{where}: {UNUSABLE_NAMES}")
    for form in _FORMS:
        if name := form.found(names):
            return InputError(f"{where}: {form.what}; {form.remedy} ({name})")
    return _prefixed(where, names)


def _prefixed(where: str, names: Sequence[str]) -> GptossError | None:
    """What is wrong where the right names stand behind a prefix, or without theirs."""
    wrapped = next((name for name in names if name.endswith(f".{_LAYER}")), None)
    if wrapped is not None:
        prefix = wrapped.removesuffix(_LAYER)
        return InputError(
            f"{where}: every name begins with {prefix!r}, as a model in a training wrapper (DDP, "
            f"FSDP, torch.compile, PEFT) is saved; {_SAVE_MODEL}"
        )
    if _LAYER.removeprefix("model.") in names:
        return InputError(
            f"{where}: a bare GptOssModel without its head: names begin with 'layers.'; save the "
            "GptOssForCausalLM around it"
        )
    if any(re.match(r"block\.\d+\.", name) for name in names):
        return InputError(
            f"{where}: OpenAI's names beside Hugging Face's config.json; put OpenAI's own "
            "config.json there"
        )
    return None


def recognise_foreign(where: str, chunks: Iterable[Chunk]) -> GptossError | None:
    """The same for a directory with OpenAI's config.json."""
    if any(chunk.tensor.startswith("model.layers.") for chunk in chunks):
        return InputError(
            f"{where}: Hugging Face's names beside OpenAI's config.json; put the model's Hugging "
            "Face config.json there"
        )
    return None

"""Directories that look like GPT-OSS weights and are not: recognised by header and named."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import GptossError, InputError, IntegrityError
from gptoss_convert.formats.names import Names

_COLLAPSED = re.compile(r"(gate_up_proj|down_proj)\$")
_LAYER = "model.layers.0.input_layernorm.weight"
"""A name that every GPT-OSS in Hugging Face's naming has."""
_LOOKED_AT = 20_000
"""Names that are looked at: 120b with a tensor for each expert has 14,000."""
_MERGE = "merge them into their base model first"
_SAVE_HF = "save it in Hugging Face's naming first, as save_pretrained does"


@dataclass(frozen=True)
class Form:
    """Tensors that are no GPT-OSS in a known naming, but have a name: what they are, what helps."""

    pattern: str
    what: str
    remedy: str

    def found(self, names: Sequence[str]) -> str | None:
        """The first name that shows this form."""
        # A name that tells comes early; there may be a hundred thousand that do not.
        few = islice(names, _LOOKED_AT)
        return next((name for name in few if re.search(self.pattern, name)), None)


_FORMS = (
    Form(
        r"\.lora_[AB]\.|\.lora_(embedding|magnitude)|\.modules_to_save\.|\.ia3_|\.vera_|"
        r"\.adapter\.linear_|prompt_embeddings$|trainable_tokens_delta|\.base_layer\.",
        "LoRA weights",
        _MERGE,
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
        "leave them to the server, with --drop '*_scale'",
    ),
    Form(
        r"\.(w13|w2)_(weight|bias|weight_scale)$|\.qkv_proj\.|\.self_attn\.attn\.",
        "vLLM's or SGLang's sharded_state, a rank's own layout",
        "save the model itself in Hugging Face's naming first",
    ),
    Form(r"\.experts\.(gate|up|down)_proj\.(weight|scales|biases|bias)$", "MLX's naming", _SAVE_HF),
    Form(r"(^|\.)decoder\.layers\.", "Megatron's naming", "have Megatron save torch_dist"),
    Form(r"^(blk\.\d+|token_embd)\.", "llama.cpp's naming", _SAVE_HF),
    Form(
        r"(^|\.)(v_head|value_head|reward_head|rm_head)\.",
        "a value head, as trainers with rewards save",
        "leave it out with --drop, such as --drop '*v_head*'",
    ),
    Form(
        r"(^|\.)(score|classifier|qa_outputs|classification_head)\.",
        "a head for classification in place of the vocabulary",
        "no format here has it",
    ),
    Form(
        r"rotary_emb\.|\.attn\.bias$|\.masked_bias$|position_ids$",
        "buffers that are computed and never read",
        "leave them out with --drop, such as --drop '*rotary_emb*'",
    ),
    Form(
        r"^block\.\d+\.(attn|mlp)\.",
        "OpenAI's names beside Hugging Face's config.json",
        "put OpenAI's own config.json there",
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


NESTED = "a state dict as torch nests it, of no model of Megatron's; name this folder itself"
TRAINERS_FOLDERS = ("huggingface", "tokenizer", ".hf_metadata")
"""Folders in which trainers put what belongs to the model and is no weight: verl, NeMo-RL,
Automodel."""
UNUSABLE_NAMES = (
    "saved by transformers 5.8 to 5.20 after dequantising: the experts of all layers were written "
    "under one name ('gate_up_proj$'), so all but one layer's are lost; convert the original again"
)


@dataclass(frozen=True)
class Directory:
    """A directory that is no checkpoint of a known format, but has a name."""

    pattern: str
    """A file or folder of this pattern shows it."""
    what: str
    """What it is, and what helps; `{found}` is the file that shows it."""
    error: type[GptossError] = InputError
    always: bool = False
    """Also where a format knows the directory for its own."""

    def found(self, root: Path) -> str | None:
        """The file or folder that shows it, the first by name."""
        shown = (path.relative_to(root).as_posix() for path in root.glob(self.pattern))
        return min(shown, default=None)


_INSIDE = "no checkpoint itself, but the folder of some: name one of them, such as {folder}"
_DIRECTORIES = (
    Directory(
        "adapter_config.json",
        "a LoRA adapter, not a model; name its base as SOURCE, and it as --adapter",
        AdapterError,
        always=True,
    ),
    Directory(
        "mp_rank_*_model_states.pt",
        "DeepSpeed's ZeRO ({found}); its own script makes it readable: python zero_to_fp32.py "
        "{parent} OUT --safe_serialization",
        always=True,
    ),
    Directory(
        "global_step*/mp_rank_*_model_states.pt",
        "DeepSpeed's ZeRO ({found}); its own script makes it readable: python zero_to_fp32.py "
        "{root} OUT --safe_serialization",
    ),
    Directory("mp_rank_*", "Megatron's legacy torch format, without model_optim_rng.pt in {found}"),
    Directory(
        "model-rank-*-part-*.safetensors",
        "vLLM's or SGLang's sharded_state (model-rank-*-part-*.safetensors); save the model itself "
        "in Hugging Face's naming first",
        always=True,
    ),
    Directory(
        "adapter_model.*",
        "LoRA weights (adapter_model.*), not a model; name their base as SOURCE, and this, with "
        "its adapter_config.json, as --adapter",
        always=True,
    ),
    Directory("*.gguf", "a GGUF file; supported: safetensors and torch_dist", always=True),
    Directory(
        "*.incomplete",
        "an unfinished download (*.incomplete); run it again",
        IntegrityError,
        always=True,
    ),
    Directory(
        "pytorch_model_fsdp_rank*.bin",
        "flat parameters of FSDP 1 (LOCAL_STATE_DICT), which say nothing of what lies where; save "
        "with SHARDED_STATE_DICT",
    ),
    Directory("pytorch_model*.bin", "shards of torch.save without pytorch_model.bin.index.json"),
    Directory(
        "*.distcp", "no .metadata: an unfinished (perhaps asynchronous) save", IntegrityError
    ),
    Directory(
        ".cache/huggingface/download/*.incomplete",
        "an unfinished download ({found}); run it again",
        IntegrityError,
    ),
    *(
        Directory(f"*{ending}", f"an unfinished download (*{ending}); run it again", IntegrityError)
        for ending in (".part", ".aria2", ".crdownload", ".download")
    ),
    Directory("*/.metadata", _INSIDE),
    Directory("*/pytorch_model_fsdp_0", _INSIDE),
    Directory("*/policy/weights", _INSIDE),
    Directory("*/model/shard-*-model-*.safetensors", _INSIDE),
    Directory("*/shard-*-model-*.safetensors", _INSIDE),
    Directory("*/actor/model_world_size_*_rank_*.pt", _INSIDE),
    Directory("*/policy/model_world_size_*_rank_*.pt", _INSIDE),
    Directory(
        "*.safetensors",
        "not a GPT-OSS checkpoint by itself: safetensors without a config.json that says "
        "model_type; pass --config CONFIG_JSON, that of the model",
    ),
)
"""In this order: the first that a directory shows is told. One place for every such advice."""


def recognise_files(
    root: Path, claimed: bool = False, without: str | None = None
) -> GptossError | None:
    """What is wrong with a directory, judged by its file names; `claimed` by a format, or not."""
    for one in _DIRECTORIES:
        if one.pattern != without and (one.always or not claimed) and (found := one.found(root)):
            folder = found.partition("/")[0]
            words = one.what.format(found=found, folder=folder, root=root, parent=root.parent)
            return one.error(f"{root}: {words}")
    return None


def no_weights(root: Path) -> GptossError:
    """What to say of a config.json without weights beside it."""
    if problem := recognise_files(root, without="*.safetensors"):
        return problem
    if empty := sorted(path.name for path in root.glob("*.safetensors")):
        return IntegrityError(f"{root}: no tensors in {', '.join(empty)}")
    above = root.name in TRAINERS_FOLDERS
    advice = f": a trainer's; the weights lie in {root.parent}" if above else ""
    return IntegrityError(f"{root}: no *.safetensors files beside config.json{advice}")


def recognise_state(where: str, names: Names) -> GptossError | None:
    """What is wrong with a trainer's checkpoint that holds no weights."""
    if names.weights:
        return None
    held = (
        ", ".join(f"{count} {kind}" for kind, count in sorted(names.skipped.items())) or "nothing"
    )
    return InputError(
        f"{where}: no weights, only a trainer's state ({held}): name the checkpoint beside it that "
        "holds the model, such as pytorch_model_fsdp_0 beside optimizer_0"
    )


def recognise_tensors(where: str, chunks: Iterable[Chunk]) -> GptossError | None:
    """What is wrong with the tensors of a Hugging Face directory, judged by their names."""
    names = sorted({chunk.tensor for chunk in chunks})
    if any(_COLLAPSED.search(name) for name in names):
        return IntegrityError(f"{where}: {UNUSABLE_NAMES}")
    for form in _FORMS:
        if name := form.found(names):
            return InputError(f"{where}: {form.what}; {form.remedy} ({name})")
    return _partial(where, names)


def _partial(where: str, names: Sequence[str]) -> GptossError | None:
    """What is wrong where a model is not whole, or in another format's names."""
    if _LAYER in names and not any(".experts." in name for name in names):
        return InputError(
            f"{where}: a model without its experts, as torchtitan 0.3 exports; convert the "
            "checkpoint that it was exported from, step-N, which has them"
        )
    if _LAYER.removeprefix("model.") in names:
        return InputError(
            f"{where}: a bare GptOssModel without its head: names begin with 'layers.'; save the "
            "GptOssForCausalLM around it"
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

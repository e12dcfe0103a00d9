"""What each key of Hugging Face's config.json means here: one table, with the reason of each.

Sources: transformers' GptOssConfig, PreTrainedConfig and masking utilities, of 5.23.
A key that is not in the table changes no number of a GPT-OSS model there, and is carried as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

Check = Callable[[Any], bool]


class Use(Enum):
    """What is done with a key."""

    READ = "a number of the model; left out, it is what transformers takes"
    FIXED = "GPT-OSS has one value only; any other is refused"
    TWIN = "another name of a number: both must say the same"
    REFUSED = "changes the numbers in a way that no format here can say; neutral values pass"
    CARRIED = "changes no number: carried where transformers accepts its value, else left out"
    TOKEN = "ids of tokens: carried where the vocabulary has them, else left out"
    RESTATED = "written anew, as it is true of TARGET"
    LEFT = "of a run, a head or a directory that TARGET is not: left out"


@dataclass(frozen=True)
class Key:
    """One key: its use, what that use needs to know, and why."""

    use: Use
    value: Any = None
    """READ: the default. FIXED: the value. TWIN: the other name. REFUSED: neutral values."""
    why: str = ""
    accepts: Check = lambda value: True
    """CARRIED: whether transformers loads a config.json with this value."""


def _of(*kinds: type) -> Check:
    return lambda value: type(value) in kinds


_FLAG, _NUMBER, _COUNT, _TEXT = _of(bool), _of(int, float), _of(int), _of(str)

KEYS: Mapping[str, Key] = {
    "num_hidden_layers": Key(Use.READ, 36),
    "num_local_experts": Key(Use.READ, 128),
    "num_experts_per_tok": Key(Use.READ, 4),
    "hidden_size": Key(Use.READ, 2880),
    "intermediate_size": Key(Use.READ, 2880),
    "num_attention_heads": Key(Use.READ, 64),
    "num_key_value_heads": Key(Use.READ, 8),
    "head_dim": Key(Use.READ, 64),
    "vocab_size": Key(Use.READ, 201088),
    "sliding_window": Key(Use.READ, 128),
    "max_position_embeddings": Key(Use.READ, 131072),
    "swiglu_limit": Key(Use.READ, 7.0),
    "rms_norm_eps": Key(Use.READ, 1e-05),
    "rope_theta": Key(Use.READ, 150000.0, "may stand in the rope section instead"),
    "model_type": Key(Use.FIXED, "gpt_oss"),
    "attention_bias": Key(Use.FIXED, True),
    "tie_word_embeddings": Key(Use.FIXED, False),
    "hidden_act": Key(Use.FIXED, "silu", "what runs is a clamped gated QuickGELU all the same"),
    "swiglu_alpha": Key(Use.FIXED, 1.702, "built into OpenAI's and Megatron's code"),
    "num_experts": Key(Use.TWIN, "num_local_experts", "transformers' attribute_map"),
    "experts_per_token": Key(Use.TWIN, "num_experts_per_tok", "read by Ollama"),
    "initial_context_length": Key(Use.TWIN, "original_max_position_embeddings", "read by Ollama"),
    "original_max_position_embeddings": Key(
        Use.TWIN, "original_max_position_embeddings", "overrides the rope section's"
    ),
    "partial_rotary_factor": Key(Use.REFUSED, (None, 1, 1.0), "turns a part of each head only"),
    "per_layer_config": Key(Use.REFUSED, (None, {}), "other numbers in single layers"),
    "is_causal": Key(Use.REFUSED, (None, True), "false lets tokens see what follows them"),
    "is_encoder_decoder": Key(Use.REFUSED, (None, False), "another architecture"),
    "pruned_heads": Key(Use.REFUSED, (None, {}), "heads that transformers 4 removes"),
    "transformers_weights": Key(Use.REFUSED, (None,), "transformers loads that file instead"),
    "text_config": Key(Use.REFUSED, (None,), "a model within a model"),
    "vision_config": Key(Use.REFUSED, (None,), "a model within a model"),
    "audio_config": Key(Use.REFUSED, (None,), "a model within a model"),
    "decoder": Key(Use.REFUSED, (None,), "a model within a model"),
    "encoder": Key(Use.REFUSED, (None,), "a model within a model"),
    "generator": Key(Use.REFUSED, (None,), "a model within a model"),
    "attention_dropout": Key(Use.CARRIED, why="training", accepts=_NUMBER),
    "initializer_range": Key(Use.CARRIED, why="training", accepts=_NUMBER),
    "router_aux_loss_coef": Key(Use.CARRIED, why="training", accepts=_NUMBER),
    "output_router_logits": Key(Use.CARRIED, why="what a call returns", accepts=_FLAG),
    "output_hidden_states": Key(Use.CARRIED, why="what a call returns", accepts=_FLAG),
    "return_dict": Key(Use.CARRIED, why="what a call returns", accepts=_FLAG),
    "use_cache": Key(Use.CARRIED, why="speed", accepts=_FLAG),
    "chunk_size_feed_forward": Key(Use.CARRIED, why="memory", accepts=_COUNT),
    "transformers_version": Key(Use.CARRIED, why="who wrote SOURCE", accepts=_TEXT),
    "eos_token_id": Key(Use.TOKEN),
    "bos_token_id": Key(Use.TOKEN),
    "pad_token_id": Key(Use.TOKEN, why="beyond the vocabulary, transformers refuses the model"),
    "architectures": Key(Use.RESTATED, why="wrappers such as FSDP name their own class"),
    "dtype": Key(Use.RESTATED, why="TARGET is bfloat16, whatever SOURCE was before --cast"),
    "torch_dtype": Key(Use.RESTATED, why="the older name of dtype"),
    "layer_types": Key(Use.RESTATED, why="read, and refused where it does not alternate"),
    "rope_scaling": Key(Use.RESTATED, why="read; written in both spellings"),
    "rope_parameters": Key(Use.RESTATED, why="read; written in both spellings"),
    "quantization_config": Key(Use.RESTATED, why="present exactly where the experts are MXFP4"),
    "compression_config": Key(Use.LEFT, why="compressed-tensors' quantization_config"),
    "auto_map": Key(Use.LEFT, why="names code that is not carried"),
    "attn_implementation": Key(Use.LEFT, why="a choice of the run that saved it"),
    "experts_implementation": Key(Use.LEFT, why="a choice of the run that saved it"),
    "_attn_implementation_autoset": Key(Use.LEFT, why="a choice of the run that saved it"),
    "_attn_implementation_internal": Key(Use.LEFT, why="a choice of the run that saved it"),
    "output_attentions": Key(Use.LEFT, why="a choice of the run that saved it"),
    "use_return_dict": Key(Use.LEFT, why="transformers cannot set it"),
    "problem_type": Key(Use.LEFT, why="of a classification head"),
    "id2label": Key(Use.LEFT, why="of a classification head"),
    "label2id": Key(Use.LEFT, why="of a classification head"),
    "num_labels": Key(Use.LEFT, why="of a classification head"),
}
"""By name; the rope sections' own keys are in ROPE."""

ROPE: Mapping[str, Key] = {
    "rope_type": Key(Use.FIXED, "yarn"),
    "type": Key(Use.FIXED, "yarn", "the older name of rope_type"),
    "factor": Key(Use.READ),
    "original_max_position_embeddings": Key(Use.READ, why="left out: max_position_embeddings"),
    "beta_fast": Key(Use.READ, 32.0),
    "beta_slow": Key(Use.READ, 1.0),
    "truncate": Key(Use.READ, True, "the released models say false"),
    "rope_theta": Key(Use.READ, why="left out: the key beside the section"),
    "attention_factor": Key(Use.READ, why="left out: 0.1 ln(factor) + 1, or by mscale"),
    "mscale": Key(Use.READ, why="with mscale_all_dim a way to say attention_factor"),
    "mscale_all_dim": Key(Use.READ, why="with mscale a way to say attention_factor"),
    "partial_rotary_factor": Key(Use.REFUSED, (None, 1, 1.0), "turns a part of each head only"),
    "attn_factor": Key(Use.REFUSED, (None, 1, 1.0), "vLLM's further factor"),
    "extrapolation_factor": Key(Use.REFUSED, (None, 1, 1.0), "vLLM's weight of the ramp"),
    "apply_yarn_scaling": Key(Use.REFUSED, (None, True), "vLLM's switch of attention_factor"),
    "finetuned": Key(Use.CARRIED, why="a remark of older YaRN models, read by nobody"),
}
"""Keys of `rope_scaling` and `rope_parameters`. Any other is refused: rope is numbers only."""


def neutral(value: Any, values: tuple[Any, ...]) -> bool:
    """Whether a value is one of these, of the same type: 1 is not True."""
    return any(type(value) is type(one) and value == one for one in values)

"""What servers accept: the names, dtypes and shapes of our Hugging Face outputs by their rules.

The rules are told in our own words from the released packages: vllm 0.33.0
(model_executor/models/gpt_oss.py, models/utils.py), sglang 0.5.23 (srt/models/gpt_oss.py), mlx-lm
0.32.2 (models/gpt_oss.py); Ollama's from its convert_gptoss.go. vLLM and SGLang skip a name that
they do not know without a word, so here every tensor must be taken, and every parameter filled.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from gptoss_convert import Options, convert
from tests.tiny_files import write_megatron, write_openai
from tests.tiny_models import DISTINCT, random_weights

S = DISTINCT
Q, KV, ROWS = S.heads * S.head_dim, S.kv_heads * S.head_dim, 2 * S.inter
Headers = dict[str, tuple[str, tuple[int, ...]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """HF outputs made from OpenAI's layout, and one from Megatron, which has no config.json."""
    root = tmp_path_factory.mktemp("loaders")
    weights = random_weights(S, seed=6)
    write_openai(root / "openai", S, weights)
    write_megatron(root / "megatron" / "iter_0000001", S, weights)
    convert(root / "openai", root / "mxfp4", Options(to="hf"))
    convert(root / "openai", root / "bf16", Options(to="hf", dtype="bf16"))
    config = root / "bf16" / "config.json"
    convert(root / "megatron", root / "back", Options(to="hf", dtype="mxfp4", config=config))
    return root


def headers(directory: Path) -> Headers:
    found: Headers = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
                part = file.get_slice(name)
                found[name] = (part.get_dtype(), tuple(part.get_shape()))
    return found


def config_of(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "config.json").read_text(encoding="utf-8"))


COMMON: Headers = {
    "model.embed_tokens.weight": ("BF16", (S.vocab, S.hidden)),
    "lm_head.weight": ("BF16", (S.vocab, S.hidden)),
    "model.norm.weight": ("BF16", (S.hidden,)),
    "model.layers.{}.input_layernorm.weight": ("BF16", (S.hidden,)),
    "model.layers.{}.post_attention_layernorm.weight": ("BF16", (S.hidden,)),
    "model.layers.{}.self_attn.q_proj.weight": ("BF16", (Q, S.hidden)),
    "model.layers.{}.self_attn.q_proj.bias": ("BF16", (Q,)),
    "model.layers.{}.self_attn.k_proj.weight": ("BF16", (KV, S.hidden)),
    "model.layers.{}.self_attn.k_proj.bias": ("BF16", (KV,)),
    "model.layers.{}.self_attn.v_proj.weight": ("BF16", (KV, S.hidden)),
    "model.layers.{}.self_attn.v_proj.bias": ("BF16", (KV,)),
    "model.layers.{}.self_attn.o_proj.weight": ("BF16", (S.hidden, Q)),
    "model.layers.{}.self_attn.o_proj.bias": ("BF16", (S.hidden,)),
    "model.layers.{}.self_attn.sinks": ("BF16", (S.heads,)),
    "model.layers.{}.mlp.router.weight": ("BF16", (S.experts, S.hidden)),
    "model.layers.{}.mlp.router.bias": ("BF16", (S.experts,)),
    "model.layers.{}.mlp.experts.gate_up_proj_bias": ("BF16", (S.experts, ROWS)),
    "model.layers.{}.mlp.experts.down_proj_bias": ("BF16", (S.experts, S.hidden)),
}
EXPERTS = "model.layers.{}.mlp.experts."
BLOCKS = {"hidden": S.hidden // 32, "inter": S.inter // 32}
PACKED: Headers = {
    f"{EXPERTS}gate_up_proj_blocks": ("U8", (S.experts, ROWS, BLOCKS["hidden"], 16)),
    f"{EXPERTS}gate_up_proj_scales": ("U8", (S.experts, ROWS, BLOCKS["hidden"])),
    f"{EXPERTS}down_proj_blocks": ("U8", (S.experts, S.hidden, BLOCKS["inter"], 16)),
    f"{EXPERTS}down_proj_scales": ("U8", (S.experts, S.hidden, BLOCKS["inter"])),
}
"""vLLM and SGLang choose this path by quantization_config.quant_method, and cut whole blocks."""
PLAIN: Headers = {
    f"{EXPERTS}gate_up_proj": ("BF16", (S.experts, S.hidden, ROWS)),
    f"{EXPERTS}down_proj": ("BF16", (S.experts, S.inter, S.hidden)),
}
"""vLLM permutes and SGLang transposes the last two axes: inputs must come first."""
WANTED = {"mxfp4": COMMON | PACKED, "bf16": COMMON | PLAIN, "back": COMMON | PACKED}


@pytest.mark.parametrize("name", WANTED)
def test_every_tensor_is_one_that_vllm_and_sglang_take_and_none_is_missing(
    folder: Path, name: str
) -> None:
    wanted = {key.format(n): held for key, held in WANTED[name].items() for n in range(S.layers)}
    assert headers(folder / name) == wanted


@pytest.mark.parametrize("name", WANTED)
def test_the_configuration_chooses_the_path_that_fits_the_tensors(folder: Path, name: str) -> None:
    config = config_of(folder / name)
    assert config["architectures"] == ["GptOssForCausalLM"]
    assert config["model_type"] == "gpt_oss"
    method = config.get("quantization_config", {}).get("quant_method")
    assert method == (None if name == "bf16" else "mxfp4")


SUBSTRINGS = {".self_attn.": ".attn."}
SUFFIXES = {
    ".embed_tokens.weight": ".embedding.weight",
    ".gate_up_proj_blocks": ".w13_weight",
    ".down_proj_blocks": ".w2_weight",
    ".gate_up_proj_scales": ".w13_weight_scale",
    ".down_proj_scales": ".w2_weight_scale",
    ".gate_up_proj": ".w13_weight",
    ".down_proj": ".w2_weight",
    ".gate_up_proj_bias": ".w13_bias",
    ".down_proj_bias": ".w2_bias",
}
"""vLLM's renaming; the names it asks for afterwards stand in the test below."""


@pytest.mark.parametrize("name", WANTED)
def test_vllm_finds_a_parameter_behind_every_renamed_tensor(folder: Path, name: str) -> None:
    renamed: set[str] = set()
    for key in headers(folder / name):
        for old, new in SUBSTRINGS.items():
            key = key.replace(old, new, 1)
        ending = next((old for old in SUFFIXES if key.endswith(old)), "")
        key = key.removesuffix(ending) + SUFFIXES.get(ending, "")
        renamed.add(re.sub(r"\.\d+\.", ".", key))
    experts = {f"w{n}_{kind}" for n in (13, 2) for kind in ("weight", "bias")}
    experts |= {"w13_weight_scale", "w2_weight_scale"} if name != "bf16" else set()
    attention = {f"{p}_proj.{kind}" for p in "qkvo" for kind in ("weight", "bias")}
    assert renamed == {
        *("model.embedding.weight", "model.norm.weight", "lm_head.weight"),
        *("model.layers.input_layernorm.weight", "model.layers.post_attention_layernorm.weight"),
        *(f"model.layers.attn.{part}" for part in (*attention, "sinks")),
        *(f"model.layers.mlp.router.{kind}" for kind in ("weight", "bias")),
        *(f"model.layers.mlp.experts.{part}" for part in experts),
    }


def test_mlx_lm_makes_the_arrays_of_its_modules_from_packed_experts(folder: Path) -> None:
    """Blocks become words of 8 codes, rows are split into gate (even) and up (odd)."""
    made: dict[str, tuple[int, ...]] = {}
    for name, (dtype, shape) in headers(folder / "mxfp4").items():
        part = name.rpartition(".experts.")[2]
        if name.startswith("model.layers.0.mlp.experts."):
            if part.endswith("_blocks"):
                assert dtype == "U8"
                shape = (*shape[:-2], shape[-2] * shape[-1] // 4)
            rows = 1
            if part.startswith("gate_up_proj"):
                assert shape[rows] % 2 == 0
                shape = (shape[0], shape[1] // 2, *shape[2:])
            made[part] = shape
    experts, hidden, inter = S.experts, S.hidden, S.inter
    assert made == {
        "gate_up_proj_blocks": (experts, inter, hidden // 8),
        "gate_up_proj_scales": (experts, inter, hidden // 32),
        "gate_up_proj_bias": (experts, inter),
        "down_proj_blocks": (experts, hidden, inter // 8),
        "down_proj_scales": (experts, hidden, inter // 32),
        "down_proj_bias": (experts, hidden),
    }


@pytest.mark.parametrize("name", WANTED)
def test_mlx_lm_and_ollama_find_yarn_where_they_look(folder: Path, name: str) -> None:
    config = config_of(folder / name)
    assert config["rope_theta"] == S.rope_theta
    assert config["rope_scaling"]["rope_type"] == "yarn"
    assert config["rope_scaling"]["factor"] == S.rope_factor
    assert config["rope_scaling"]["original_max_position_embeddings"] == S.original_length
    assert config["initial_context_length"] == S.original_length
    assert config["experts_per_token"] == config["num_experts_per_tok"] == 4
    assert config["layer_types"] == ["sliding_attention", "full_attention"] * (S.layers // 2)


@pytest.mark.parametrize("name", WANTED)
def test_vllm_finds_yarn_in_rope_parameters_and_truncate_off(folder: Path, name: str) -> None:
    config = config_of(folder / name)
    rope = config.get("rope_parameters") or config["rope_scaling"] | {
        "rope_theta": config["rope_theta"]
    }
    assert rope["truncate"] is False
    assert (rope["beta_fast"], rope["beta_slow"]) == (S.beta_fast, 1.0)
    assert (rope["rope_theta"], rope["factor"]) == (S.rope_theta, S.rope_factor)

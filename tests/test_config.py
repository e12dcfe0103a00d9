"""config.json of each ecosystem: what is read, what is refused by name, what is written."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats import config as configs
from tests.test_golden import published_config
from tests.tiny_files import hf_config, openai_config
from tests.tiny_models import DISTINCT

HF: dict[str, Any] = hf_config(DISTINCT, mxfp4=False)
OPENAI: dict[str, Any] = openai_config(DISTINCT)
ROPE: dict[str, Any] = HF["rope_scaling"]


def without(content: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in keys}


def test_both_ecosystems_say_the_same_of_one_model():
    assert configs.from_hf("x", HF) == configs.from_openai("x", OPENAI)


def test_rope_is_read_in_its_old_and_its_new_form():
    new = without(HF, "rope_scaling", "rope_theta") | {
        "rope_parameters": {**ROPE, "rope_theta": 150000.0}
    }
    both = HF | {"rope_parameters": new["rope_parameters"]}
    assert configs.from_hf("x", new) == configs.from_hf("x", HF) == configs.from_hf("x", both)


def rope(**changes: Any) -> dict[str, Any]:
    return HF | {"rope_scaling": {**ROPE, **changes}}


BAD_HF: dict[str, tuple[dict[str, Any], str]] = {
    "another model": (HF | {"model_type": "llama"}, "model_type 'llama'; supported: 'gpt_oss'"),
    "no model": (
        without(HF, "model_type"),
        "model_type ['GptOssForCausalLM']; supported: 'gpt_oss'",
    ),
    "tied embeddings": (
        HF | {"tie_word_embeddings": True},
        "tie_word_embeddings is True, GPT-OSS has False",
    ),
    "another alpha": (HF | {"swiglu_alpha": 1.5}, "swiglu_alpha is 1.5, GPT-OSS has 1.702"),
    "a fraction": (HF | {"head_dim": 64.0}, "head_dim is 64.0, expects a whole number"),
    "a truth value": (HF | {"vocab_size": True}, "vocab_size is True, expects a whole number"),
    "a text": (HF | {"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5', expects a number"),
    "a text for the limit": (HF | {"swiglu_limit": "7"}, "swiglu_limit is '7', expects a number"),
    "zero": (
        HF | {"hidden_size": 0},
        f"hidden_size is 0, expects more than 0 and at most {1 << 40}",
    ),
    "endless layers": (
        HF | {"num_hidden_layers": 1 << 39},
        f"num_hidden_layers is {1 << 39}, expects more than 0 and at most 1024",
    ),
    "endless experts": (
        HF | {"num_local_experts": 1 << 39},
        f"num_local_experts is {1 << 39}, expects more than 0 and at most 4096",
    ),
    "other layers": (
        HF | {"layer_types": ["full_attention"] * 4},
        "layer_types do not alternate sliding_attention, full_attention over 4 layers",
    ),
    "rope is a list": (
        HF | {"rope_scaling": []},
        "rope_parameters and rope_scaling must be objects",
    ),
    "an empty rope": (
        without(HF, "rope_scaling") | {"rope_parameters": {}},
        "rope_type is None, GPT-OSS has 'yarn'",
    ),
    "linear rope": (rope(rope_type="linear"), "rope_type is 'linear', GPT-OSS has 'yarn'"),
    "rope for some layers": (
        HF | {"rope_scaling": {"full_attention": ROPE}},
        "rope_type is None, GPT-OSS has 'yarn'",
    ),
    "rope for others": (
        rope(sliding_attention={}),
        "rope_scaling.sliding_attention is {}: no key of YaRN; remove it if the model does not "
        "depend on it",
    ),
    "half of each head": (
        rope(partial_rotary_factor=0.5),
        "rope_scaling.partial_rotary_factor is 0.5: turns a part of each head only",
    ),
    "half of each head, beside the section": (
        HF | {"partial_rotary_factor": 0.5},
        "partial_rotary_factor is 0.5: turns a part of each head only",
    ),
    "vLLM's own factor": (
        rope(attn_factor=0.5),
        "rope_scaling.attn_factor is 0.5: vLLM's further factor",
    ),
    "a factor of 0": (
        rope(attention_factor=0),
        f"rope_scaling: attention_factor is 0, expects more than 0 and at most {1 << 40}",
    ),
    "two kinds of rope": (rope(type="linear"), "rope_type is 'linear', GPT-OSS has 'yarn'"),
    "no factor": (
        HF | {"rope_scaling": without(ROPE, "factor")},
        "rope_scaling: no 'factor'",
    ),
    "theta null": (
        HF | {"rope_theta": None},
        "rope_theta is None, expects a number",
    ),
    "theta of 1": (HF | {"rope_theta": 1}, "rope_theta is 1, expects more than 1"),
    "a factor that shrinks": (rope(factor=0.5), "rope factor is 0.5, expects at least 1"),
    "theta twice": (
        rope(rope_theta=1e4),
        "rope_scaling.rope_theta is 10000.0, rope_theta is 150000.0",
    ),
    "one form has a key that the other lacks": (
        HF | {"rope_parameters": {**ROPE, "attention_factor": 1.5, "rope_theta": 150000.0}},
        "rope_parameters.attention_factor is 1.5, rope_scaling has None",
    ),
    "two numbers of experts": (
        HF | {"num_experts": 5},
        "num_experts is 5, num_local_experts is 8",
    ),
    "two original lengths": (
        HF | {"original_max_position_embeddings": 64},
        "original_max_position_embeddings is 64, original_max_position_embeddings is 128",
    ),
    "more experts a token than there are": (
        HF | {"num_experts_per_tok": 9, "experts_per_token": 9},
        "num_experts_per_tok is 9, expects at most num_local_experts, 8",
    ),
    "heads that cannot share": (
        HF | {"num_key_value_heads": 4},
        "num_attention_heads is 15, expects a multiple of num_key_value_heads, 4",
    ),
    "an odd head": (
        HF | {"head_dim": 21},
        "head_dim is 21, expects an even number: rope turns pairs",
    ),
    "other numbers in a layer": (
        HF | {"per_layer_config": {"0": {"head_dim": 4}}},
        "per_layer_config is {'0': {'head_dim': 4}}: other numbers in single layers",
    ),
    "no causal mask": (
        HF | {"is_causal": False},
        "is_causal is False: false lets tokens see what follows them",
    ),
    "other weights": (
        HF | {"transformers_weights": "other.safetensors"},
        "transformers_weights is 'other.safetensors': transformers loads that file instead",
    ),
    "a model within": (
        HF | {"text_config": {"a": 1}},
        "text_config is {'a': 1}: a model within a model",
    ),
    "two thetas": (
        HF | {"rope_parameters": {**ROPE, "rope_theta": 1.0}},
        "rope_parameters.rope_theta is 1.0, rope_theta is 150000.0",
    ),
    "two numbers of experts a token": (
        HF | {"experts_per_token": 2},
        "experts_per_token is 2, num_experts_per_tok is 4",
    ),
    "two context lengths": (
        HF | {"initial_context_length": 4096},
        "initial_context_length is 4096, original_max_position_embeddings is 128",
    ),
}


@pytest.mark.parametrize("fault", BAD_HF)
def test_a_bad_config_is_refused_with_the_exact_message(fault: str):
    content, message = BAD_HF[fault]
    with pytest.raises(InputError) as refused:
        configs.from_hf("config.json", content)
    assert str(refused.value) == f"config.json: {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (without(OPENAI, "num_experts"), "no 'num_experts'"),
        (
            OPENAI | {"x": 1},
            "unknown key 'x'; OpenAI's ModelConfig has no such field",
        ),
        (OPENAI | {"num_experts": 8.0}, "num_experts is 8.0, expects a whole number"),
        (OPENAI | {"rope_theta": None}, "rope_theta is None, expects a number"),
    ],
)
def test_openais_config_has_exactly_its_keys(content: dict[str, Any], message: str):
    with pytest.raises(InputError) as refused:
        configs.from_openai("config.json", content)
    assert str(refused.value) == f"config.json: {message}"


def test_what_is_filled_in_is_said():
    lean = without(HF, "layer_types", "swiglu_limit") | {"rope_scaling": without(ROPE, "truncate")}
    config = configs.from_hf("x", lean)
    assert config.notes == (
        "swiglu_limit is missing: taken as 7.0, as transformers does",
        "rope truncate is missing: taken as true, as transformers does; released: false",
        "layer_types is missing: taken as alternating, sliding first, as released",
    )
    assert config.rope_truncate


def test_what_is_left_out_is_what_transformers_takes():
    config = configs.from_hf("x", {"model_type": "gpt_oss"})
    released = configs.from_hf("x", published_config("120b"))
    assert replace(config, notes=()) == released


def test_the_number_of_experts_has_two_names():
    other = without(HF, "num_local_experts") | {"num_experts": 8}
    assert configs.from_hf("x", other) == configs.from_hf("x", HF | {"num_experts": 8})
    assert configs.from_hf("x", other) == configs.from_hf("x", HF)


def test_two_ways_to_say_the_factor_of_cosines():
    said = configs.from_hf("x", rope(attention_factor=1.25)).attention_factor
    scales = configs.from_hf("x", rope(mscale=0.5, mscale_all_dim=2.0)).attention_factor
    own = configs.from_hf("x", rope(mscale=0.5)).attention_factor
    factor = ROPE["factor"]
    assert (said, own) == (1.25, None)
    assert scales == (0.05 * math.log(factor) + 1) / (0.2 * math.log(factor) + 1)


def test_a_renamed_fine_tune_is_accepted():
    for name in ("FSDPGptOssForCausalLM", "MySafeguard"):
        assert configs.from_hf("x", HF | {"architectures": [name]}).head_dim == 20


def test_unknown_keys_survive_and_order_does_not_matter():
    config = configs.from_hf("x", HF)
    base = {"zz": {"deep": [1]}, **HF}
    written = json.loads(configs.hf_json(config, base, mxfp4=True))
    assert written["zz"] == {"deep": [1]}
    assert written["quantization_config"] == configs.MXFP4_CONFIG
    assert configs.hf_json(config, dict(reversed(base.items())), mxfp4=True) == configs.hf_json(
        config, base, mxfp4=True
    )


def test_what_is_written_is_read_back():
    config = configs.from_hf("x", HF)
    for mxfp4 in (True, False):
        written = json.loads(configs.hf_json(config, None, mxfp4=mxfp4))
        assert configs.from_hf("x", written) == config
        assert ("quantization_config" in written) == mxfp4
    assert configs.from_openai("x", json.loads(configs.openai_json(config))) == config


def test_openais_config_is_refused_where_it_cannot_say_the_number():
    config = configs.from_hf("x", HF | {"rms_norm_eps": 1e-6})
    with pytest.raises(InputError, match=r"rms_norm_eps is 1e-06, OpenAI's layout cannot say it"):
        configs.openai_json(config)


def test_released_sizes_have_names():
    config = configs.from_hf("x", HF)
    assert config.size == "4 layers, 8 experts, hidden 224"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expects a JSON object, found list"),
        ('{"a": 1, "a": 2}', "key 'a' appears twice"),
        ('{"a": Infinity}', "not JSON: Infinity is not a JSON number"),
        ("{", "not JSON: Expecting property name enclosed in double quotes: "),
        ('{"a":' * 100_000, "not JSON that anybody writes: nested too deep"),
        ('{"a": ' + "1" * 5000 + "}", "not JSON: Exceeds the limit"),
    ],
)
def test_json_from_others_is_read_strictly(text: str, message: str):
    with pytest.raises(IntegrityError) as refused:
        parse_object("x.json", text)
    assert str(refused.value).startswith(f"x.json: {message}")

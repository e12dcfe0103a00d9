"""config.json of each ecosystem: what is read, what is refused by name, what is written."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest

from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats import config as configs
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
    "another quantisation": (
        HF | {"quantization_config": {"quant_method": "gptq"}},
        "quantised with 'gptq'; supported: 'mxfp4' or none",
    ),
    "quantisation of another type": (
        HF | {"quantization_config": "mxfp4"},
        "quantization_config is 'mxfp4', expects an object",
    ),
    "no number": (without(HF, "head_dim"), "no 'head_dim'"),
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
    "no rope": (without(HF, "rope_scaling"), "rope_type is None, GPT-OSS has 'yarn'"),
    "linear rope": (rope(rope_type="linear"), "rope_type is 'linear', GPT-OSS has 'yarn'"),
    "rounded rope": (rope(truncate=True), "rope truncate is True, GPT-OSS has False"),
    "no theta": (without(HF, "rope_theta"), "no 'rope_theta'"),
    "two thetas": (
        HF | {"rope_parameters": {**ROPE, "rope_theta": 1.0}},
        "rope_parameters.rope_theta is 1.0, rope_scaling has 150000.0",
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
        "rope truncate is missing: taken as false, as released",
        "layer_types is missing: taken as alternating, sliding first, as released",
        "swiglu_limit is missing: taken as 7.0, as released",
    )


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

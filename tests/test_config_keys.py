"""Every key of config.json, on configurations nobody would write twice: one judgement of convert,
verify and transformers, and a TARGET whose config.json transformers takes as the same model."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from logging import CRITICAL
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GptOssConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

from gptoss_convert.errors import InputError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats.config.keys import KEYS, ROPE, Use
from gptoss_convert.witness import rotary
from gptoss_convert.witness.configs import Section
from gptoss_convert.witness.hf_config import hf_config as witness_config
from tests.tiny_files import hf_config
from tests.tiny_models import DISTINCT

HF: dict[str, Any] = hf_config(DISTINCT, mxfp4=False)
SLIDING = HF["layer_types"]
ABSENT = object()

JUNK = st.sampled_from([None, True, False, 0, 1, -1, 2.5, "x", [], {}, [1], {"a": 1}])
ROPE_KEYS = {
    "rope_type": st.sampled_from(["yarn", "yarn", "yarn", "linear", ABSENT, None]),
    "type": st.sampled_from([ABSENT, ABSENT, "yarn", "default"]),
    "factor": st.sampled_from([4.0, 4, 1, 1.0, 0.5, None, ABSENT]),
    "original_max_position_embeddings": st.sampled_from([128, 128, 3, ABSENT, None, 128.0]),
    "beta_fast": st.sampled_from([8.0, 8, ABSENT, None, 0, 0.5]),
    "beta_slow": st.sampled_from([1.0, 2, ABSENT, None, 64.0]),
    "truncate": st.sampled_from([False, False, True, ABSENT, None, 1]),
    "rope_theta": st.sampled_from([ABSENT, ABSENT, 150000.0, 150000, 1e4, None]),
    "attention_factor": st.sampled_from([ABSENT, ABSENT, 1.0, 1.25, 2, None, 0, 1.5]),
    "mscale": st.sampled_from([ABSENT, ABSENT, 0.5, 1.0, None]),
    "mscale_all_dim": st.sampled_from([ABSENT, ABSENT, 0.5, 2.0, None]),
    "partial_rotary_factor": st.sampled_from([ABSENT, ABSENT, None, 1.0, 1, 0.5, True]),
    "attn_factor": st.sampled_from([ABSENT, ABSENT, ABSENT, 1.0, 0.7]),
    "apply_yarn_scaling": st.sampled_from([ABSENT, ABSENT, True, 1, False]),
    "finetuned": st.sampled_from([ABSENT, True, "yes"]),
    "full_attention": st.sampled_from([ABSENT, ABSENT, ABSENT, {}, None]),
}


def objects(keys: dict[str, st.SearchStrategy[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    """Objects of a few of these keys, at values that may be ABSENT."""
    some = st.sets(st.sampled_from(sorted(keys)), max_size=4)
    return some.flatmap(lambda names: st.fixed_dictionaries({name: keys[name] for name in names}))


SECTION = objects(ROPE_KEYS).map(lambda odd: applied(dict(HF["rope_scaling"]), odd))
COUNT = st.sampled_from([ABSENT, 1, 2, 4, 5, 8, 15, 20, 0, 8.0, None])
ODD: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys([name for name, key in KEYS.items() if key.use is Use.READ], COUNT),
    **dict.fromkeys([name for name, key in KEYS.items() if key.use is not Use.READ], JUNK),
    "model_type": st.sampled_from(["gpt_oss", "gpt_oss", "llama", ABSENT]),
    "attention_bias": st.sampled_from([True, 1, False, ABSENT, None]),
    "tie_word_embeddings": st.sampled_from([False, 0, True, ABSENT, None]),
    "hidden_act": st.sampled_from(["silu", "gelu", ABSENT]),
    "swiglu_alpha": st.sampled_from([1.702, 1.5, ABSENT]),
    "swiglu_limit": st.sampled_from([7, 7.5, ABSENT, "7", None, 0]),
    "rms_norm_eps": st.sampled_from([1, 1e-6, ABSENT, None]),
    "rope_theta": st.sampled_from([ABSENT, 1e4, 150000, 1, 1.0, None, 2.5]),
    "num_experts": st.sampled_from([ABSENT, 8, 5, None]),
    "experts_per_token": st.sampled_from([ABSENT, 4, 4.0, 2, 9]),
    "num_experts_per_tok": st.sampled_from([4, ABSENT, 8, 9]),
    "initial_context_length": st.sampled_from([ABSENT, 128, 4096]),
    "original_max_position_embeddings": st.sampled_from([ABSENT, 128, 512, 4096]),
    "max_position_embeddings": st.sampled_from([512, 513, 1, ABSENT, None]),
    "is_causal": st.sampled_from([ABSENT, True, None, False, 1, 0]),
    "layer_types": st.sampled_from([ABSENT, None, SLIDING, SLIDING[:1], SLIDING[::-1], "x"]),
    "architectures": st.sampled_from([ABSENT, None, ["FSDPGptOssForCausalLM"], "x", []]),
    "dtype": st.sampled_from([ABSENT, None, "float32", "bfloat16", "auto", "bf16"]),
    "torch_dtype": st.sampled_from([ABSENT, None, "float32", "float16", "auto"]),
    "eos_token_id": st.sampled_from([ABSENT, None, 5, 200002, [5, 200002], [200002], -1, "x", 1.0]),
    "pad_token_id": st.sampled_from([ABSENT, None, 5, 199999, -1, "x"]),
    "quantization_config": st.sampled_from([ABSENT, None]),
    "rope_scaling": st.one_of(st.sampled_from([ABSENT, None, {}, []]), SECTION),
    "rope_parameters": st.one_of(st.sampled_from([ABSENT, None, {}]), SECTION),
    "id2label": st.sampled_from([ABSENT, {"0": "x"}, {"a": "b"}]),
    "a_key_of_tomorrow": JUNK,
}


def applied(content: dict[str, Any], odd: dict[str, Any]) -> dict[str, Any]:
    """The content with other values, and without those that are to be ABSENT."""
    return {key: value for key, value in {**content, **odd}.items() if value is not ABSENT}


SECTION_OF_5 = {**HF["rope_scaling"], "rope_theta": 1000.0}
NEWER = applied(HF, {"rope_scaling": ABSENT, "rope_theta": ABSENT, "rope_parameters": SECTION_OF_5})
CONFIGS = st.tuples(st.sampled_from([HF, NEWER]), objects(ODD)).map(lambda both: applied(*both))
quick = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.fixture(autouse=True, scope="module")
def silent() -> Any:
    before = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    yield
    logging.set_verbosity(before)


def read(content: dict[str, Any]) -> configs.Config | None:
    try:
        return configs.from_hf("config.json", content)
    except InputError:
        return None


@given(CONFIGS)
@quick
def test_convert_and_verify_take_a_configuration_alike(content: dict[str, Any]):
    config = read(content)
    try:
        found = witness_config(Section(content, "config.json"))
    except InputError as refused:
        assert config is None, refused
        return
    assert config is not None, configs.from_hf("config.json", content)
    assert (found.rope_factor, found.rope_theta) == (config.rope_factor, config.rope_theta)
    assert found.rope_original_length == config.original_max_position_embeddings
    assert (found.rope_beta_fast, found.rope_beta_slow) == (config.beta_fast, config.beta_slow)
    assert found.rope_truncate == config.rope_truncate
    assert found.rope_concentration == config.attention_factor
    assert (found.heads, found.kv_heads) == (config.num_attention_heads, config.num_key_value_heads)
    assert (found.experts, found.experts_per_token) == (
        config.num_local_experts,
        config.num_experts_per_tok,
    )
    assert (found.hidden, found.inter) == (config.hidden_size, config.intermediate_size)
    assert (found.head_dim, found.vocab, found.window) == (
        config.head_dim,
        config.vocab_size,
        config.sliding_window,
    )
    assert (found.swiglu_limit, found.norm_eps) == (config.swiglu_limit, config.rms_norm_eps)
    assert len(found.sliding) == config.num_hidden_layers


NUMBERS = [
    *("num_hidden_layers", "num_local_experts", "num_experts_per_tok", "hidden_size"),
    *("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size"),
    *("sliding_window", "max_position_embeddings", "swiglu_limit", "rms_norm_eps", "layer_types"),
]


def numbers_of(loaded: GptOssConfig) -> tuple[Any, ...]:
    """What transformers computes with: the plain numbers, and YaRN's frequencies and factor."""
    frequencies, factor = ROPE_INIT_FUNCTIONS["yarn"](loaded, torch.device("cpu"))
    return [getattr(loaded, name) for name in NUMBERS], frequencies.tolist(), factor


def loaded(content: dict[str, Any]) -> GptOssConfig | None:
    """As transformers loads it, None where it does not."""
    try:
        found = GptOssConfig.from_dict(json.loads(json.dumps(content)))
        numbers_of(found)
        return found
    except Exception:  # Whatever it says: it does not load.
        return None


@given(CONFIGS)
@quick
def test_transformers_loads_every_target_and_computes_what_it_would_of_source(
    content: dict[str, Any],
):
    config = read(content)
    if config is None:
        return
    written = json.loads(configs.hf_json(config, content, mxfp4=False))
    target = loaded(written)
    assert target is not None, GptOssConfig.from_dict(written)
    source = loaded(content)
    if source is not None:
        assert numbers_of(source) == numbers_of(target)
    again = configs.from_hf("config.json", written)
    assert [getattr(again, n) for n in vars(again) if n != "notes"] == [
        getattr(config, n) for n in vars(config) if n != "notes"
    ]
    assert target.architectures == ["GptOssForCausalLM"]
    assert target.dtype in {None, torch.bfloat16}
    for token in ("eos_token_id", "pad_token_id", "bos_token_id"):
        ids = getattr(target, token)
        for one in ids if isinstance(ids, list) else [ids]:
            assert one is None or 0 <= one < config.vocab_size
    assert configs.corrections(config, written) == []


@given(CONFIGS)
@quick
def test_the_forward_pass_turns_positions_as_transformers_does(content: dict[str, Any]):
    config = read(content)
    source = loaded(content)
    if config is None or source is None:
        return
    _, frequencies, factor = numbers_of(source)
    found = witness_config(Section(content, "config.json"))
    ours = rotary.inverse_frequencies(found)
    torch.testing.assert_close(ours, torch.tensor(frequencies), rtol=1e-5, atol=1e-9)
    cos, _ = rotary.rotary_tables(found, 1, torch.device("cpu"))
    assert math.isclose(float(cos[0, 0]), factor, rel_tol=1e-6)


def test_every_key_that_transformers_declares_has_a_place_in_the_table():
    declared = {one.name for one in fields(GptOssConfig) if not one.name.startswith("_")}
    assert declared - KEYS.keys() == set()


def test_every_key_of_yarn_that_transformers_reads_has_a_place_in_the_table():
    assert {"rope_type", "factor", "original_max_position_embeddings", "beta_fast"} < ROPE.keys()
    taken = {"beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim", "rope_theta"}
    assert taken < ROPE.keys()

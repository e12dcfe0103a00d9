"""Mapping tables: every format loads, and a bad rule is refused by name."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from importlib import resources
from typing import Any

import pytest

from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.layouts.model import load_model, parse_model, read_hub
from gptoss_convert.layouts.table_files import load_table, parse_table

FORMATS = ("hf", "openai", "megatron", "scales")
NUMBERS = {
    "num_hidden_layers": 3,
    "num_local_experts": 5,
    "vocab_size": 11,
    "hidden_size": 96,
    "intermediate_size": 64,
    "num_attention_heads": 21,
    "num_key_value_heads": 7,
    "head_dim": 4,
}


def content_of(name: str) -> dict[str, Any]:
    path = resources.files("gptoss_convert.mappings").joinpath(f"{name}.toml")
    return tomllib.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("format", FORMATS)
def test_every_table_loads(format: str):
    assert load_table(format).format == format


def test_the_variants_are_these():
    assert {f: [*load_table(f).variants] for f in FORMATS} == {
        "hf": [
            *("mxfp4", "bf16", "mis-saved", "mis-saved-rows"),
            *("expert-rows", "expert-split", "expert-halves", "expert-gates"),
        ],
        "openai": ["mxfp4"],
        "megatron": [
            *("stacked", "stacked-local", "stacked-both"),
            *("per-layer", "per-layer-local", "per-layer-both"),
            *("per-expert", "per-expert-local"),
            *("module-grouped", "module-grouped-local"),
            *("module-sequential", "module-sequential-local"),
        ],
        "scales": ["scales"],
    }


def test_every_complete_variant_holds_every_weight_or_its_blocks_and_scales():
    plain = frozenset(load_model().families)
    encoded = [f for f in load_model().families.values() if f.encodings]
    packed = plain - {f.weight for f in encoded} | {m for f in encoded for m in f.members[1:]}
    for format in FORMATS[:3]:
        table = load_table(format)
        for variant in table.variants:
            assert table.holds(variant) == (packed if variant == "mxfp4" else plain)


def test_an_unknown_variant_lists_the_choices():
    with pytest.raises(UsageError, match=r"^openai: no variant 'bf16'; choose mxfp4$"):
        load_table("openai").variant("bf16")


def test_tensors_come_in_table_order_layer_by_layer():
    sizes = load_model().sizes(NUMBERS)
    names = [tensor.name for tensor in load_table("openai").tensors("mxfp4", sizes)]
    assert names[:3] == ["embedding.weight", "block.0.attn.norm.scale", "block.0.attn.qkv.weight"]
    assert names[-3:] == ["block.2.mlp.mlp2_bias", "norm.scale", "unembedding.weight"]
    assert len(names) == len(set(names)) == 3 + 15 * 3


def test_one_tensor_an_expert_has_gate_and_up_apart():
    sizes = load_model().sizes(NUMBERS)
    tensors = {t.name: t for t in load_table("megatron").tensors("per-expert", sizes)}
    prefix = "decoder.layers.2.mlp.experts.experts.4.linear_fc1.weight"
    assert tensors[f"{prefix}_w"].shape == tensors[f"{prefix}_v"].shape == (64, 96)
    assert tensors[f"{prefix}_w"].bound == {"layer": 2, "expert": 4, "glu": 0}
    assert tensors[f"{prefix}_v"].bound == {"layer": 2, "expert": 4, "glu": 1}


def test_chunk_axes_become_the_shape_of_one_chunk():
    sizes = load_model().sizes(NUMBERS)
    tensors = {t.name: t for t in load_table("megatron").tensors("stacked", sizes)}
    fc1 = tensors["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert (fc1.shape, fc1.chunk_shape) == ((3, 5, 128, 96), (1, 1, 64, 96))


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (
            {"num_attention_heads": 20},
            "config: num_attention_heads 20 is not a multiple of num_key_value_heads 7",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused(numbers: dict[str, int], message: str):
    with pytest.raises(InputError) as refused:
        load_model().sizes(NUMBERS | numbers)
    assert str(refused.value) == message


def test_hub_errors_name_parameter_and_axis():
    assert refusal_of_model(lambda hub: hub["axes"].update(byte="4 * 4")) == (
        "model.toml: axis 'byte': '4 * 4' is not a key, a number or a quotient"
    )
    assert refusal_of_model(lambda hub: hub["params"].update(new="layer row")) == (
        "model.toml: new: unknown axis 'row'"
    )
    assert refusal_of_model(lambda hub: hub["params"].update(new="layer layer")) == (
        "model.toml: new: axis 'layer' appears twice"
    )
    assert refusal_of_model(lambda hub: hub["mxfp4"].update({"new": {}})) == (
        "model.toml: [mxfp4] names 'new', which is no parameter"
    )
    assert refusal_of_model(lambda hub: hub["mxfp4"]["down.weight"].update(bits="layer")) == (
        "model.toml: [mxfp4] down.weight: unknown key 'bits'; known: blocks, scales"
    )
    assert refusal_of_model(lambda hub: hub["mxfp4"]["down.weight"].update(scales="layer")) == (
        "model.toml: [mxfp4] down.weight: only the last axis may be cut into blocks"
    )
    assert refusal_of_model(lambda hub: hub.update(extra={})) == ("[extra]: no codec has this name")


def refusal_of_model(change: Callable[[dict[str, Any]], object]) -> str:
    content = read_hub()
    change(content)
    with pytest.raises(InputError) as refused:
        parse_model(content)
    return str(refused.value)


def hf_rule(changes: dict[str, Any]) -> Callable[[dict[str, Any]], object]:
    name = "model.layers.{layer}.mlp.experts.gate_up_proj_bias"
    return lambda table: table["biases"][name].update(changes)


BIAS = "hf.toml: model.layers.{layer}.mlp.experts.gate_up_proj_bias"
NORM = "model.norm.weight"
BAD_TABLES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no container": (lambda t: t.pop("container"), "hf.toml: no 'container'"),
    "no variants": (lambda t: t.pop("variants"), "hf.toml: no 'variants'"),
    "unknown container": (
        lambda t: t.update(container="zarr"),
        "hf.toml: unknown container 'zarr'",
    ),
    "variant of no section": (
        lambda t: t["variants"].update(fp8=["common", "fp8"]),
        "hf.toml: variant 'fp8' names no section 'fp8'",
    ),
    "section of no variant": (
        lambda t: t.update(fp8={}),
        "hf.toml: section 'fp8' belongs to no variant",
    ),
    "unknown key": (
        hf_rule({"dtype": "BF16"}),
        f"{BIAS}: unknown key 'dtype'; known: alias, at, chunk, layout, param, part",
    ),
    "no layout": (lambda t: t["common"][NORM].pop("layout"), f"hf.toml: {NORM}: no 'layout'"),
    "no param": (lambda t: t["common"][NORM].pop("param"), f"hf.toml: {NORM}: no 'param'"),
    "unknown parameter": (
        hf_rule({"param": "gate.bias"}),
        f"{BIAS}: unknown parameter 'gate.bias'",
    ),
    "unknown axis": (hf_rule({"layout": "expert (inter glu) row"}), f"{BIAS}: unknown axis 'row'"),
    "unknown axis in the name": (
        lambda t: t["common"].update({"x.{row}": {"param": "norm.weight", "layout": "hidden"}}),
        "hf.toml: x.{row}: unknown axis 'row'",
    ),
    "foreign axis": (
        hf_rule({"layout": "expert (inter glu) hidden"}),
        f"{BIAS}: 'gate_up.bias' has no axis 'hidden' (axes: layer expert inter glu)",
    ),
    "axis twice": (
        hf_rule({"layout": "expert (inter glu) expert"}),
        f"{BIAS}: layout 'expert (inter glu) expert': axis 'expert' appears twice",
    ),
    "axis in name and layout": (
        hf_rule({"layout": "layer expert (inter glu)"}),
        f"{BIAS}: axis 'layer' stands in the name and in the layout",
    ),
    "axis missing": (
        hf_rule({"layout": "expert inter"}),
        f"{BIAS}: layout 'expert inter' places no axis 'glu' of 'gate_up.bias'",
    ),
    "star missing": (
        hf_rule({"param": ["gate_up.bias", "gate_up.bias"]}),
        f"{BIAS}: 2 parameters need a '*' in 'expert (inter glu)'",
    ),
    "chunk axis elsewhere": (
        hf_rule({"chunk": "hidden"}),
        f"{BIAS}: chunk axis 'hidden' is not in layout 'expert (inter glu)'",
    ),
    "held twice": (
        lambda t: t["common"].update({"x": {"param": "norm.weight", "layout": "hidden"}}),
        f"hf.toml: mxfp4: 'norm.weight' is held by {NORM}, x",
    ),
    "held twice by one rule": (
        lambda t: t["common"].update(
            {NORM: {"param": ["norm.weight", "norm.weight"], "layout": "*"}}
        ),
        f"hf.toml: mxfp4: 'norm.weight' is held by {NORM}, {NORM}",
    ),
    "held never": (
        lambda t: t["common"].pop(NORM),
        "hf.toml: mxfp4: 'norm.weight' is held by no tensor",
    ),
    "scales never held": (
        lambda t: t["mxfp4"].pop("model.layers.{layer}.mlp.experts.down_proj_scales"),
        "hf.toml: mxfp4: 'down.weight' is held by no tensor",
    ),
    "held plain and encoded": (
        lambda t: t["variants"].update(mxfp4=["common", "biases", "mxfp4", "bf16"]),
        "hf.toml: mxfp4: 'gate_up.weight' is held plain and as 'gate_up.weight.blocks'",
    ),
    "tensor twice in a variant": (
        lambda t: t["variants"].update(mxfp4=["common", "biases", "mxfp4", "common"]),
        "hf.toml: mxfp4: tensor 'model.embed_tokens.weight' appears twice",
    ),
    "only one index of an axis": (
        hf_rule({"layout": "expert inter", "at": {"glu": 0}}),
        "hf.toml: mxfp4: 'gate_up.bias' is held by "
        "model.layers.{layer}.mlp.experts.gate_up_proj_bias",
    ),
    "a part of nothing": (
        hf_rule({"part": [3, 2]}),
        f"{BIAS}: part [3, 2], expects [i, n]: the i-th of n equal parts",
    ),
    "a part without the others": (
        hf_rule({"part": [1, 2]}),
        "hf.toml: mxfp4: 'gate_up.bias' is held by "
        "model.layers.{layer}.mlp.experts.gate_up_proj_bias",
    ),
    "two dtypes in one tensor": (
        hf_rule({"param": ["gate_up.weight.scales", "gate_up.bias"], "layout": "*"}),
        f"{BIAS}: 'gate_up.weight.scales' is U8, 'gate_up.bias' is BF16",
    ),
}


@pytest.mark.parametrize("fault", BAD_TABLES)
def test_a_bad_table_is_refused_with_the_exact_message(fault: str):
    content = content_of("hf")
    change, message = BAD_TABLES[fault]
    change(content)
    with pytest.raises(InputError) as refused:
        parse_table("hf", content, load_model())
    assert str(refused.value) == message


def test_indexes_of_one_axis_must_be_complete_and_distinct():
    content = content_of("megatron")
    name = "decoder.layers.{layer}.mlp.experts.experts.{expert}.linear_fc1.weight_"
    content["per-expert"][f"{name}v"]["at"] = {"glu": 0}
    with pytest.raises(InputError) as refused:
        parse_table("megatron", content, load_model())
    assert str(refused.value) == (
        f"megatron.toml: per-expert: 'gate_up.weight' is held by {name}w, {name}v"
    )


def test_holes_of_a_name_are_filled_by_the_index_of_their_axis():
    sizes = load_model().sizes(NUMBERS)
    names = {t.name for t in load_table("megatron").tensors("per-expert", sizes)}
    fc2 = "decoder.layers.{}.mlp.experts.experts.{}.linear_fc2.weight"
    expected = {fc2.format(layer, expert) for layer in range(3) for expert in range(5)}
    assert {name for name in names if "fc2.weight" in name} == expected

"""Adapters as their writers save and merge them: recorded, read by the tables, merged, compared.

The records are made by tools/record_adapters.py and tools/record_dialects.py with the writers' own
code; see tests/adapter_values.py for the values.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import gptoss_convert
from gptoss_convert import AdapterOptions
from gptoss_convert.errors import UsageError
from gptoss_convert.witness.adapted import AdaptedReader
from gptoss_convert.witness.adapter_files import Asked
from gptoss_convert.witness.fetch import Fetcher
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.model import LayerWeights
from tests.adapter_files import (
    RECORDS,
    all_records,
    base_tensors,
    records,
    write_base,
    write_recorded,
)
from tests.adapter_values import BASES, LAYERS

DEVICE = torch.device("cpu")
PEFT = [one for one in all_records() if one[0].startswith("peft-")]
OTHERS = [one for one in all_records() if not one[0].startswith("peft-")]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name, name) for name in BASES}


def hf_tensors(parameters: Mapping[str, Any], names: Iterator[str]) -> Iterator[tuple[str, Tensor]]:
    """Tensors of Hugging Face's BF16 layout out of the hub's parameters, stated by hand."""
    whole = {
        "model.embed_tokens.weight": "embedding.weight",
        "model.norm.weight": "norm.weight",
        "lm_head.weight": "unembedding.weight",
    }
    plain = {
        "input_layernorm.weight": "attention.norm.weight",
        "post_attention_layernorm.weight": "mlp.norm.weight",
        "self_attn.sinks": "attention.sinks",
        "self_attn.o_proj.bias": "attention.out.bias",
        "mlp.router.weight": "router.weight",
        "mlp.router.bias": "router.bias",
        "mlp.experts.down_proj_bias": "down.bias",
    }
    for name in names:
        if name in whole:
            yield name, parameters[whole[name]][...]
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        n = int(layer)
        if rest in plain:
            value = parameters[plain[rest]][n]
            yield name, value.flatten() if rest.endswith("sinks") else value
        elif rest == "mlp.experts.gate_up_proj":
            yield name, parameters["gate_up.weight"][n].flatten(1, 2).transpose(1, 2)
        elif rest == "mlp.experts.gate_up_proj_bias":
            yield name, parameters["gate_up.bias"][n].flatten(1, 2)
        elif rest == "mlp.experts.down_proj":
            yield name, parameters["down.weight"][n].transpose(1, 2)
        elif rest == "self_attn.o_proj.weight":
            yield name, parameters["attention.out.weight"][n].flatten(1)
        else:
            p, kind = rest.removeprefix("self_attn.").split("_proj.")
            value = parameters[f"attention.{p}.{kind}"][n]
            yield name, value.flatten(0, -2) if kind == "weight" else value.flatten()


def crc(tensor: Tensor) -> str:
    content = tensor.contiguous().view(torch.int16).numpy().astype("<i2").tobytes()
    return f"{zlib.crc32(content):08x}"


def changed(parameters: Mapping[str, Any], base: str) -> dict[str, str]:
    before = base_tensors(base)
    after = dict(hf_tensors(parameters, iter(before)))
    return {name: crc(t) for name, t in after.items() if crc(t) != crc(before[name])}


def asked_down(file: str) -> str:
    """What a user who knows both versions answers."""
    _, peft, _, transformers = file.removesuffix(".json").split("-")
    swaps = transformers.startswith("5") if peft == "0.19.0" else transformers.startswith("4")
    return "swapped" if swaps and not peft.startswith(("0.17", "0.18")) else "normal"


@pytest.mark.parametrize(("file", "variant"), PEFT)
def test_peft_arithmetic_is_the_merge_of_peft_bit_by_bit(
    file: str, variant: str, bases: Mapping[str, Path], tmp_path: Path
):
    record = records(file)[variant]
    adapter = write_recorded(tmp_path / "adapter", record)
    base = bases[record["base"]]
    options = AdapterOptions(str(adapter), adapter_arithmetic="peft")
    # These versions cannot have swapped it, and say so themselves.
    asks = variant == "down, square" and not file.startswith(("peft-0.17", "peft-0.18"))
    if asks:
        with pytest.raises(UsageError, match="--adapter-down swapped"):
            gptoss_convert.open(base, adapter=options)
        down = asked_down(file)
        options = AdapterOptions(str(adapter), adapter_arithmetic="peft", adapter_down=down)
    with gptoss_convert.open(base, adapter=options) as merged:
        assert changed(merged, record["base"]) == record["merged"]
    witness = witness_of(base, adapter, options, as_peft=True)
    with gptoss_convert.open(base, adapter=options) as merged:
        assert_same_weights(witness, merged)


@pytest.mark.parametrize(("file", "variant"), OTHERS)
def test_other_writers_merges_are_the_exact_sums(
    file: str, variant: str, bases: Mapping[str, Path], tmp_path: Path
):
    """With the records' values, these writers' float32 merges are exact until they are rounded."""
    record = records(file)[variant]
    adapter = write_recorded(tmp_path / "adapter", record)
    options = AdapterOptions(str(adapter))
    base = bases[record["base"]]
    if (file, variant) == ("unsloth.json", "fused"):
        with pytest.raises(UsageError, match="--adapter-layout grouped"):
            gptoss_convert.open(base, adapter=options)
        options = AdapterOptions(str(adapter), adapter_layout="grouped")
    with gptoss_convert.open(base, adapter=options) as merged:
        assert changed(merged, record["base"]) == record["merged"]
        assert_same_weights(witness_of(base, adapter, options), merged)


@pytest.mark.parametrize("variant", records("peft-0.21.2-transformers-5.24.0.json"))
def test_the_witness_agrees_with_exact_sums(
    variant: str, bases: Mapping[str, Path], tmp_path: Path
):
    record = records("peft-0.21.2-transformers-5.24.0.json")[variant]
    adapter = write_recorded(tmp_path / "adapter", record)
    down = "normal" if variant == "down, square" else None
    options = AdapterOptions(str(adapter), adapter_down=down)
    base = bases[record["base"]]
    with gptoss_convert.open(base, adapter=options) as merged:
        assert_same_weights(witness_of(base, adapter, options), merged)


def test_the_export_of_megatron_bridge_to_peft_is_recognised(bases: Mapping[str, Path]):
    """Its own files (main of 2026-08-22); what they merge to is what its checkpoint does."""
    adapter = RECORDS / "bridge-export"
    options = AdapterOptions(str(adapter))
    with gptoss_convert.open(bases["distinct"], adapter=options) as merged:
        expected = records("bridge-main.json")["a pair for each expert"]["merged"]
        assert changed(merged, "distinct") == expected
        assert_same_weights(witness_of(bases["distinct"], adapter, options), merged)


def witness_of(
    base: Path, adapter: Path, options: AdapterOptions, as_peft: bool = False
) -> AdaptedReader:
    asked = Asked(options.adapter_layout, options.adapter_down)
    return AdaptedReader(HfReader(base, DEVICE), adapter, asked, Fetcher(DEVICE), as_peft)


def assert_same_weights(witness: AdaptedReader, merged: Mapping[str, Any]) -> None:
    """The witness's merge, in its own words, against the parameters."""
    assert torch.equal(witness.embedding(), merged["embedding.weight"][...])
    assert torch.equal(witness.unembedding(), merged["unembedding.weight"][...])
    assert torch.equal(witness.norm(), merged["norm.weight"][...])
    for n in range(LAYERS):
        weights = witness.layer(n)
        gate_up, bias = merged["gate_up.weight"][n], merged["gate_up.bias"][n]
        expected = {
            "attention_norm": merged["attention.norm.weight"][n],
            "mlp_norm": merged["mlp.norm.weight"][n],
            "sinks": merged["attention.sinks"][n].flatten(),
            "router_weight": merged["router.weight"][n],
            "router_bias": merged["router.bias"][n],
            "gate_weight": gate_up[:, :, 0],
            "up_weight": gate_up[:, :, 1],
            "gate_bias": bias[:, :, 0],
            "up_bias": bias[:, :, 1],
            "down_weight": merged["down.weight"][n],
            "down_bias": merged["down.bias"][n],
            "o_weight": merged["attention.out.weight"][n].flatten(1),
            "o_bias": merged["attention.out.bias"][n],
        }
        for p in "qkv":
            expected[f"{p}_weight"] = merged[f"attention.{p}.weight"][n].flatten(0, -2)
            expected[f"{p}_bias"] = merged[f"attention.{p}.bias"][n].flatten()
        assert expected.keys() == {f.name for f in fields(LayerWeights)}
        for name, value in expected.items():
            assert torch.equal(getattr(weights, name), value), (n, name)


def test_records_are_of_two_versions_of_peft_and_two_of_transformers():
    versions = {path.stem for path in RECORDS.glob("peft-*.json")}
    assert len({name.split("-")[1] for name in versions}) >= 2
    assert len({name.split("-")[3] for name in versions}) >= 2

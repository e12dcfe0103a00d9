"""What a file says of its dialect and strengths, and what it leaves open: variants of records.

Where no writer's code made a variant, both readings of it, by the tables and by the witness's
formulas, must agree.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import gptoss_convert
from gptoss_convert import AdapterOptions
from gptoss_convert.errors import GptossError, InputError, UsageError
from tests.adapter_files import records, write_base, write_recorded
from tests.adapter_values import BASES
from tests.test_adapter_records import assert_same_weights, changed, witness_of

Record = dict[str, Any]
Change = Callable[[Record], object]
FUSED, SEPARATE = ("unsloth.json", "fused"), ("unsloth.json", "4-bit")
TINKER, AUTOMODEL = ("tinker.json", "all"), ("automodel.json", "experts")
BRIDGE = ("bridge-main.json", "a pair for each expert")
DOWN = ("peft-0.21.2-transformers-5.24.0.json", "down, square")
GROUPED, MAJOR = "grouped_by_expert", "rank_major"


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    return {name: write_base(root / name, name) for name in BASES}


def told(**keys: Any) -> Change:
    return lambda record: record["config"].update(keys)


def marked(**keys: Any) -> Change:
    """With what Unsloth says inside auto_mapping."""
    return lambda record: record["config"]["auto_mapping"].update(keys)


def kept(*parts: str) -> Change:
    """Of the tensors those alone whose names hold one of the parts."""

    def change(record: Record) -> None:
        held = record["tensors"].items()
        record["tensors"] = {k: v for k, v in held if any(part in k for part in parts)}

    return change


def shaped(part: str, axis: Mapping[str, int], length: int) -> Change:
    """Other lengths, by the end of the name the axis that has it."""

    def change(record: Record) -> None:
        for name, (_, shape) in record["tensors"].items():
            for end, place in axis.items():
                if part in name and name.endswith(end):
                    shape[place] = length

    return change


def without_card(*keys: str, **more: Any) -> Change:
    """Without these keys and a model card."""

    def change(record: Record) -> None:
        record["config"] = {k: v for k, v in record["config"].items() if k not in keys} | more
        record["readme"] = []

    return change


def by_layer(record: Record) -> None:
    """A stacked checkpoint of Megatron-Bridge with a tensor for each layer."""
    record["tensors"] = {
        name.replace("decoder.layers.", f"decoder.layers.{n}."): [dtype, shape[1:], extent[1:]]
        for name, (dtype, shape, extent) in record["tensors"].items()
        for n in range(shape[0])
    }


def detail(word: str, **others: str) -> dict[str, Any]:
    words = {"gate_up_proj": word, "down_proj": word, **others}
    return {
        "lora_A_layout": GROUPED,
        "parameters": {n: {"lora_B_layout": one, "num_experts": 5} for n, one in words.items()},
    }


HALVES = {"lora_A.weight": 0, "lora_B.weight": 1}
FEW = {".lora_gate_and_up_A": 2, ".lora_down_A": 2, ".lora_gate_and_up_B": 1, ".lora_down_B": 1}
READ: dict[str, tuple[tuple[str, str], Change, AdapterOptions, bool]] = {
    "a word at the top": (FUSED, told(lora_B_layout=GROUPED), AdapterOptions(), True),
    "a word in auto_mapping": (FUSED, marked(lora_B_layout=GROUPED), AdapterOptions(), True),
    "a word for each parameter": (
        FUSED,
        told(unsloth_fused_expert_lora=detail(GROUPED)),
        AdapterOptions(),
        True,
    ),
    "a word for each parameter, inside": (
        FUSED,
        marked(unsloth_fused_expert_lora=detail(GROUPED)),
        AdapterOptions(),
        True,
    ),
    "the same word twice": (
        FUSED,
        told(lora_B_layout=GROUPED, unsloth_fused_expert_lora=detail(GROUPED)),
        AdapterOptions(),
        True,
    ),
    "the word and the option": (
        FUSED,
        told(lora_B_layout=GROUPED),
        AdapterOptions(adapter_layout="grouped"),
        True,
    ),
    "PEFT's order by a word": (FUSED, told(lora_B_layout=MAJOR), AdapterOptions(), False),
    "PEFT's order by the option": (
        FUSED,
        lambda record: None,
        AdapterOptions(adapter_layout="peft"),
        False,
    ),
    "some experts": (SEPARATE, kept(".0.lora_", ".3.lora_"), AdapterOptions(), False),
    "gate_up alone": (SEPARATE, kept("gate_up_projs"), AdapterOptions(), False),
    "an expert of rank 2": (
        SEPARATE,
        lambda record: [
            shaped("0.mlp.experts.gate_up_projs.1.", HALVES, 2)(record),
            told(rank_pattern={"layers.0.mlp.experts.gate_up_projs.1": 2})(record),
        ],
        AdapterOptions(),
        False,
    ),
    "an expert of another alpha": (
        SEPARATE,
        told(alpha_pattern={"down_projs.2": 32}),
        AdapterOptions(),
        False,
    ),
    "alpha by the root of the rank": (SEPARATE, told(use_rslora=True), AdapterOptions(), False),
    "Tinker's attention": (TINKER, kept(".attn."), AdapterOptions(), False),
    "Tinker's gates": (TINKER, kept(".w1."), AdapterOptions(), False),
    "Tinker, nothing shared": (
        TINKER,
        shaped(".experts.", {"lora_A.weight": 0, "lora_B.weight": 0}, 5),
        AdapterOptions(),
        False,
    ),
    "Automodel's smaller rank of experts": (
        AUTOMODEL,
        shaped(".experts.", FEW, 2),
        AdapterOptions(),
        False,
    ),
    "Bridge, layer by layer": (BRIDGE, by_layer, AdapterOptions(), True),
    "Bridge's down alone": (BRIDGE, kept("linear_fc2"), AdapterOptions(), False),
    "a square down, said to be normal": (
        DOWN,
        lambda record: None,
        AdapterOptions(adapter_down="normal", adapter_arithmetic="peft"),
        True,
    ),
    "a square down of PEFT 0.18": (
        DOWN,
        told(peft_version="0.18.0"),
        AdapterOptions(adapter_arithmetic="peft"),
        True,
    ),
    "a square down of PEFT 0.17, by its card": (
        ("peft-0.17.1-transformers-4.56.2.json", "down, square"),
        lambda record: None,
        AdapterOptions(adapter_arithmetic="peft"),
        True,
    ),
    "a square down, swapped by Bridge": (
        DOWN,
        without_card("peft_version"),
        AdapterOptions(adapter_down="swapped"),
        False,
    ),
}
"""By name: a record, what is changed, the options, and whether it merges to what is recorded."""


@pytest.mark.parametrize("name", READ)
def test_both_readings_of_a_variant_agree(name: str, bases: Mapping[str, Path], tmp_path: Path):
    (file, variant), change, options, as_recorded = READ[name]
    record = copy.deepcopy(dict(records(file)[variant]))
    change(record)
    adapter = write_recorded(tmp_path / "adapter", record)
    base = bases[record["base"]]
    as_peft = options.adapter_arithmetic == "peft"
    asked = replace(options, adapter=str(adapter))
    with gptoss_convert.open(base, adapter=asked) as merged:
        found = changed(merged, record["base"])
        assert found
        assert (found == records(file)[variant]["merged"]) is as_recorded
        assert_same_weights(witness_of(base, adapter, asked, as_peft), merged)


ASKED: dict[str, tuple[tuple[str, str], Change, AdapterOptions, type[GptossError], str]] = {
    "Unsloth's silence": (
        FUSED,
        lambda record: None,
        AdapterOptions(),
        UsageError,
        r"saved by Unsloth \(unsloth_fixed\) without saying .* pass --adapter-layout grouped",
    ),
    "a mixed file": (FUSED, told(lora_B_layout="mixed"), AdapterOptions(), InputError, "is mixed"),
    "an unknown word": (FUSED, told(lora_B_layout="x"), AdapterOptions(), InputError, "is x: only"),
    "words that differ": (
        FUSED,
        told(unsloth_fused_expert_lora=detail(GROUPED, down_proj=MAJOR)),
        AdapterOptions(),
        InputError,
        "is grouped_by_expert and rank_major",
    ),
    "a word against the option": (
        FUSED,
        told(lora_B_layout=MAJOR),
        AdapterOptions(adapter_layout="grouped"),
        UsageError,
        "says that lora_B is peft",
    ),
    "nothing to choose": (
        SEPARATE,
        lambda record: None,
        AdapterOptions(adapter_layout="grouped"),
        UsageError,
        "no fused experts' LoRA: there is nothing to choose",
    ),
    "an orientation that does not fit": (
        FUSED,
        lambda record: None,
        AdapterOptions(adapter_down="swapped", adapter_layout="peft"),
        UsageError,
        "fit normal only",
    ),
    "a square down": (
        DOWN,
        lambda record: None,
        AdapterOptions(),
        UsageError,
        r"only down_proj .* \(peft_version 0.21.2, .*\); pass --adapter-down swapped if .*"
        "transformers 4",
    ),
    "a square down of the version that was replaced": (
        DOWN,
        told(peft_version="0.19.0"),
        AdapterOptions(),
        UsageError,
        "swapped if it was trained on transformers 5",
    ),
    "a square down of nobody": (
        DOWN,
        without_card("peft_version"),
        AdapterOptions(),
        UsageError,
        r"\(no peft_version\).* or exported by Megatron-Bridge",
    ),
    "Bridge leaves nothing open": (
        BRIDGE,
        lambda record: None,
        AdapterOptions(adapter_down="swapped"),
        UsageError,
        "leaves nothing open",
    ),
}


@pytest.mark.parametrize("name", ASKED)
def test_what_only_the_user_can_know_is_asked_with_the_evidence(
    name: str, bases: Mapping[str, Path], tmp_path: Path
):
    (file, variant), change, options, error, words = ASKED[name]
    record = copy.deepcopy(dict(records(file)[variant]))
    change(record)
    adapter = write_recorded(tmp_path / "adapter", record)
    asked = replace(options, adapter=str(adapter))
    with pytest.raises(error, match=words):
        gptoss_convert.open(bases[record["base"]], adapter=asked)

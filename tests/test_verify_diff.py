"""Differences: how much, against numpy on the tensors; what one side lacks; what counts."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert.codecs.mxfp4 import library
from gptoss_convert.compare.arrays import Distance, distance, sum_of
from gptoss_convert.compare.diff import Diff, ParameterDiff, diff
from gptoss_convert.formats.checkpoint import DEFAULT, Choices
from gptoss_convert.formats.registry import open_checkpoint
from tests.tiny_files import hf_config, write_hf_bf16, write_hf_mxfp4, write_megatron, write_openai
from tests.tiny_models import DISTINCT, hf_bf16_tensors, random_weights

SHAPE = replace(DISTINCT, layers=2)
Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.0.mlp.experts.down_proj"


@pytest.fixture(scope="module")
def base() -> dict[str, Tensor]:
    return random_weights(SHAPE, seed=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, base: dict[str, Tensor]) -> Path:
    root = tmp_path_factory.mktemp("base")
    write_hf_mxfp4(root / "hf-mxfp4", SHAPE, base)
    write_hf_bf16(root / "hf-bf16", SHAPE, base)
    write_openai(root / "openai", SHAPE, base)
    write_megatron(root / "megatron" / "iter_0000001", SHAPE, base)
    (root / "config.json").write_text(json.dumps(hf_config(SHAPE, mxfp4=False)))
    return root


def edited(folder: Path, edit: Callable[[dict[str, Tensor]], object]) -> Path:
    """The tensors of an HF directory after `edit`, in one file without an index."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
        shard.unlink()
    edit(tensors)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
    return folder


def tuned(root: Path, base: dict[str, Tensor], edit: Callable[[dict[str, Tensor]], object]) -> Path:
    return edited(write_hf_bf16(root / "tuned", SHAPE, base), edit)


def differences(a: Path, b: Path, choices: Choices = DEFAULT) -> Diff:
    return diff(open_checkpoint(a, choices), open_checkpoint(b))


def of(found: Diff, parameter: str) -> ParameterDiff:
    return next(one for one in found.parameters if one.parameter == parameter)


def expected(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Share, relative norm and largest difference, by numpy in float64."""
    a, b = ours.double().numpy(), theirs.double().numpy()
    changed = ours.view(torch.int16) != theirs.view(torch.int16)
    return {
        "share": changed.double().mean().item(),
        "relative_norm": float(np.linalg.norm(b - a) / np.linalg.norm(a)),
        "max_abs": float(np.abs(b - a).max()),
    }


def numbers(found: Distance) -> dict[str, Any]:
    return {
        "share": found.share,
        "relative_norm": found.relative_norm,
        "max_abs": found.max_abs,
    }


@pytest.mark.parametrize("name", ["hf-mxfp4", "openai", "megatron"])
def test_a_fine_tune_differs_by_what_numpy_finds_from_every_format(
    folder: Path, tmp_path: Path, base: dict[str, Tensor], name: str
) -> None:
    noise = torch.Generator().manual_seed(4)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def edit(tensors: dict[str, Tensor]) -> None:
        for tensor, share in ((Q, 1.0), (DOWN, 0.1)):
            old = tensors[tensor]
            drawn = torch.randn(old.shape, generator=noise) * 0.01
            mask = torch.rand(old.shape, generator=noise) < share
            tensors[tensor] = torch.where(mask, old.float() + drawn, old.float()).bfloat16()
            kept[tensor] = (old, tensors[tensor])

    target = tuned(tmp_path, base, edit)
    config = Choices(config=folder / "config.json") if name == "megatron" else Choices()
    found = differences(folder / name, target, config)
    assert not found.same
    q, down = of(found, "attention.q.weight"), of(found, "down.weight")
    assert {one.parameter for one in found.parameters if one.total.changed} == {
        "attention.q.weight",
        "down.weight",
    }
    assert [n for n, one in q.layers.items() if one.changed] == [1]
    assert [n for n, one in down.layers.items() if one.changed] == [0]
    assert numbers(q.layers[1]) == pytest.approx(expected(*kept[Q]), rel=1e-12)
    assert numbers(down.layers[0]) == pytest.approx(expected(*kept[DOWN]), rel=1e-12)
    whole = hf_bf16_tensors(base)
    ours = torch.cat([kept[DOWN][0], whole["model.layers.1.mlp.experts.down_proj"]])
    theirs = torch.cat([kept[DOWN][1], whole["model.layers.1.mlp.experts.down_proj"]])
    assert numbers(down.total) == pytest.approx(expected(ours, theirs), rel=1e-12)
    assert found.total.elements == sum(t.numel() for t in whole.values())
    packed = "MXFP4" if name != "megatron" else "BF16"
    assert (q.encodings, down.encodings) == (("BF16", "BF16"), (packed, "BF16"))


@pytest.mark.parametrize(
    ("a", "b"), [("hf-mxfp4", "hf-bf16"), ("openai", "hf-mxfp4"), ("hf-bf16", "openai")]
)
def test_the_same_values_in_another_encoding_are_the_same(folder: Path, a: str, b: str) -> None:
    found = differences(folder / a, folder / b)
    assert found.same
    assert (found.total.changed, found.total.relative_norm) == (0, 0.0)
    packed = {"hf-bf16": "BF16"}
    assert of(found, "down.weight").encodings == tuple(packed.get(n, "MXFP4") for n in (a, b))
    assert (found.only_in_a, found.only_in_b, found.shapes, found.numbers) == ((), (), {}, {})


def test_keys_of_the_configuration_that_differ_are_listed(
    folder: Path, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    target = write_hf_bf16(tmp_path / "x", SHAPE, base)
    content = json.loads((target / "config.json").read_text())
    content |= {"eos_token_id": 7, "sliding_window": 32, "pad_to": 1}
    content["rope_scaling"]["truncate"] = False
    del content["use_cache"]
    (target / "config.json").write_text(json.dumps(content))
    found = differences(folder / "hf-mxfp4", target)
    assert not found.same
    assert found.numbers == {"sliding_window": (16, 32)}
    assert found.keys is not None
    assert found.keys.added == {"pad_to": 1}
    assert set(found.keys.removed) == {
        "quantization_config.modules_to_not_convert",
        "quantization_config.quant_method",
        "use_cache",
    }
    assert found.keys.changed == {"eos_token_id": (SHAPE.vocab - 2, 7), "sliding_window": (16, 32)}
    assert differences(folder / "openai", target).keys is None


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("transformers_version", "5.0", True),
        ("dtype", "bfloat16", True),
        ("eos_token_id", 1, False),
    ],
)
def test_keys_about_storage_alone_do_not_decide(
    folder: Path, tmp_path: Path, base: dict[str, Tensor], key: str, value: object, same: bool
) -> None:
    target = write_hf_bf16(tmp_path / "x", SHAPE, base)
    content = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(content | {key: value}))
    found = differences(folder / "hf-bf16", target)
    assert found.same is same
    assert found.keys is not None
    assert key in {*found.keys.added, *found.keys.changed}


def test_tensors_of_one_side_are_told_and_the_rest_is_compared(
    folder: Path, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[DOWN], tensors["model.norm.weight"]
        tensors["model.extra.weight"] = torch.zeros(2)
        tensors[Q][0, 0] += 1

    found = differences(folder / "hf-mxfp4", tuned(tmp_path, base, edit))
    assert found.only_in_a == ("down.weight of layers 0", "norm.weight")
    assert found.only_in_b == ("model.extra.weight",)
    assert list(of(found, "down.weight").layers) == [1]
    assert of(found, "attention.q.weight").total.changed == 1
    assert not found.same


def test_layers_that_one_side_lacks_are_told(
    folder: Path, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    deeper = replace(SHAPE, layers=3)
    weights = random_weights(deeper, seed=2) | base
    found = differences(folder / "hf-bf16", write_hf_bf16(tmp_path / "x", deeper, weights))
    assert found.numbers == {"num_hidden_layers": (2, 3)}
    assert found.only_in_a == ()
    assert "down.weight of layers 2" in found.only_in_b
    assert len(found.only_in_b) == 17
    assert found.total.changed == 0
    assert list(of(found, "down.weight").layers) == [0, 1]


def test_rows_that_a_vocabulary_gained_leave_the_others_comparable(
    folder: Path, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    wider = replace(SHAPE, vocab=SHAPE.vocab + 3)
    names = ("model.embed_tokens.weight", "lm_head.weight")
    more = {n: torch.cat((base[n], torch.ones(3, SHAPE.hidden).bfloat16())) for n in names}
    more[names[0]][5, 5] = 9
    found = differences(folder / "hf-mxfp4", write_hf_bf16(tmp_path / "x", wider, base | more))
    ours, theirs = (SHAPE.vocab, SHAPE.hidden), (wider.vocab, SHAPE.hidden)
    assert found.shapes == dict.fromkeys(("embedding.weight", "unembedding.weight"), (ours, theirs))
    assert of(found, "embedding.weight").total.elements == SHAPE.vocab * SHAPE.hidden
    assert of(found, "embedding.weight").total.changed == 1
    assert of(found, "unembedding.weight").total.changed == 0
    assert not found.same


def test_parameters_of_other_shapes_are_told_and_not_compared(
    folder: Path, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    other = replace(SHAPE, experts=4)
    found = differences(
        folder / "hf-mxfp4", write_hf_mxfp4(tmp_path / "x", other, random_weights(other, seed=2))
    )
    assert found.shapes["router.bias"] == ((2, 8), (2, 4))
    compared = {one.parameter for one in found.parameters}
    assert "attention.q.weight" in compared
    assert not compared & {"router.weight", "router.bias", "gate_up.weight", "down.weight"}


def test_float32_is_compared_as_its_rounding(
    folder: Path, tmp_path: Path, base: dict[str, Tensor]
) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: tensor.float() for name, tensor in tensors.items()})

    found = differences(folder / "hf-mxfp4", tuned(tmp_path, base, edit))
    assert found.same
    assert of(found, "router.bias").encodings == ("BF16", "F32")


def test_the_summary_is_json_with_layers_and_modules(folder: Path) -> None:
    summary = json.loads(json.dumps(differences(folder / "hf-mxfp4", folder / "hf-bf16").summary()))
    modules = {one["module"]: one for one in summary["modules"]}
    assert list(modules) == [
        *("embedding", "attention", "mlp", "router", "experts", "norm", "unembedding"),
    ]
    experts = modules["experts"]["parameters"]
    assert [one["parameter"] for one in experts] == [
        *("gate_up.weight", "gate_up.bias", "down.weight", "down.bias"),
    ]
    assert [layer["layer"] for layer in experts[0]["layers"]] == [0, 1]
    assert modules["experts"]["elements"] == sum(one["elements"] for one in experts)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("length", [1, 127, 128, 129, 5000])
def test_changes_of_any_length_are_those_of_float64(
    length: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(library, "load", lambda: None)
    random = np.random.default_rng(length)
    a = random.integers(0, 0x7F80, length).astype(np.uint16) ^ np.uint16(0x8000)
    b = np.where(random.random(length) < 0.3, a ^ np.uint16(1), a)
    x, y = (torch.from_numpy(v.astype(np.int16)).view(torch.bfloat16).double() for v in (a, b))
    found = distance(a, b)
    assert (found.elements, found.changed) == (length, int((a != b).sum()))
    assert found.squares == pytest.approx(float((x * x).sum()), rel=1e-12)
    assert found.squared_change == pytest.approx(float(((y - x) ** 2).sum()), rel=1e-12)
    assert found.max_abs == float((y - x).abs().max())


def test_infinities_and_nan_are_counted_and_left_out_of_the_sums() -> None:
    a = np.full(300, 0x3F80, np.uint16)
    b = a.copy()
    a[3], b[130], b[131], b[299] = 0x7F80, 0xFF80, 0x7FC0, 0x7FC0
    found = distance(a, b)
    assert (found.changed, found.nonfinite) == (4, 4)
    assert (found.squares, found.squared_change, found.max_abs) == (296.0, 0.0, 0.0)


def test_a_change_from_zero_has_no_relative_norm() -> None:
    zero, one = np.zeros(2, np.uint16), np.full(2, 0x3F80, np.uint16)
    assert distance(zero, one).relative_norm is None
    assert sum_of((distance(zero, one), distance(one, one))).relative_norm == 1.0
    assert sum_of(()).relative_norm == 0.0

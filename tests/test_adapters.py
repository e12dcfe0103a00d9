"""`convert --adapter` and its like: from every base to every target, with what is kept and told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import gptoss_convert
from gptoss_convert import AdapterOptions, Options
from gptoss_convert.cli.main import cli
from gptoss_convert.conversion import run as run_module
from gptoss_convert.conversion.partition import spread
from gptoss_convert.conversion.run import run
from gptoss_convert.engine.changes import Changes
from gptoss_convert.engine.factors import read_factor
from gptoss_convert.errors import GptossError, UsageError
from gptoss_convert.layouts import updates
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions
from tests.adapter_files import base_tensors, records, write_base, write_recorded
from tests.tiny_adapters import ATTENTION, EXPERTS, ROUTER, write_peft
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4, write_megatron, write_openai
from tests.tiny_models import DISTINCT, TinyShape, random_weights

Writer = Callable[[Path, TinyShape, Mapping[str, torch.Tensor]], Path]
BASES: dict[str, Writer] = {
    "hf-mxfp4": write_hf_mxfp4,
    "hf-bf16": write_hf_bf16,
    "openai": write_openai,
    "megatron": write_megatron,
}
SHORT = {"level": "logits", "sample": 64, "max_length": 64}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """One model as each kind of base, and two adapters."""
    root = tmp_path_factory.mktemp("models")
    weights = random_weights(DISTINCT, seed=5)
    places: dict[str, Path] = {}
    for name, write in BASES.items():
        place = root / name / ("iter_0000001" if name == "megatron" else "")
        places[name] = write(place, DISTINCT, weights)
    places["attention"] = write_peft(root / "attention", DISTINCT, [ATTENTION, ROUTER])
    places["experts"] = write_peft(root / "experts", DISTINCT, [ATTENTION, EXPERTS], seed=1)
    return places


def options_for(base: str, models: Mapping[str, Path], adapter: str, **more: object) -> Options:
    config = models["hf-bf16"] / "config.json" if base == "megatron" else None
    told = {"to": "hf", "dtype": "bf16", "config": config, "workers": 1, **more}
    return Options(**told, adapter=str(models[adapter]))  # pyright: ignore[reportArgumentType]


def merged_tensors(target: Path) -> dict[str, torch.Tensor]:
    return {
        k: v for path in sorted(target.glob("*.safetensors")) for k, v in load_file(path).items()
    }


@pytest.mark.parametrize("base", BASES)
def test_every_base_gives_the_same_merged_model(
    base: str, models: Mapping[str, Path], tmp_path: Path
):
    expected = gptoss_convert.open(models["hf-bf16"], adapter=str(models["experts"]))
    gptoss_convert.convert(models[base], tmp_path / "out", options_for(base, models, "experts"))
    with gptoss_convert.open(tmp_path / "out") as merged, expected:
        for name, parameter in expected.items():
            assert torch.equal(merged[name][...], parameter[...]), name


@pytest.mark.parametrize(
    "to", [{"to": "openai", "dtype": "keep"}, {"to": "hf", "dtype": "keep"}, {"to": "megatron"}]
)
def test_every_target_is_verified_by_the_witness(
    to: Mapping[str, str], models: Mapping[str, Path], tmp_path: Path
):
    options = options_for("hf-mxfp4", models, "attention", **to)
    gptoss_convert.convert(models["hf-mxfp4"], tmp_path / "out", options)
    asked = VerifyOptions(**SHORT, adapter=str(models["attention"]))
    assert verify_checkpoints(models["hf-mxfp4"], tmp_path / "out", asked).same
    without = verify_checkpoints(models["hf-mxfp4"], tmp_path / "out", VerifyOptions(**SHORT))
    assert not without.same


def test_an_attention_adapter_leaves_every_byte_of_mxfp4_experts(
    models: Mapping[str, Path], tmp_path: Path
):
    options = options_for("hf-mxfp4", models, "attention", dtype="keep")
    gptoss_convert.convert(models["hf-mxfp4"], tmp_path / "out", options)
    before, after = merged_tensors(models["hf-mxfp4"]), merged_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    same = {name for name, tensor in before.items() if torch.equal(tensor, after[name])}
    assert {name for name in before if ".experts." in name} <= same
    assert all("_proj.weight" in name or "router.weight" in name for name in before.keys() - same)


def test_expert_adapters_are_rounded_to_mxfp4_only_if_asked(
    models: Mapping[str, Path], tmp_path: Path
):
    options = options_for("hf-mxfp4", models, "experts", dtype="keep")
    with pytest.raises(UsageError, match="changes the experts, which MXFP4 rounds; pass --dtype"):
        gptoss_convert.plan(models["hf-mxfp4"], tmp_path / "out", options)
    lossy = options_for("hf-mxfp4", models, "experts", dtype="keep", lossy=True)
    gptoss_convert.convert(models["hf-mxfp4"], tmp_path / "out", lossy)
    exact = options_for("hf-mxfp4", models, "experts")
    gptoss_convert.convert(models["hf-mxfp4"], tmp_path / "exact", exact)
    scales = models["hf-mxfp4"]  # What the base had decides between scales, as it does straight.
    again = Options(to="hf", dtype="mxfp4", lossy=True, workers=1, scales=scales)
    gptoss_convert.convert(tmp_path / "exact", tmp_path / "rounded", again)
    straight, by_way = merged_tensors(tmp_path / "out"), merged_tensors(tmp_path / "rounded")
    assert all(torch.equal(tensor, by_way[name]) for name, tensor in straight.items())


def test_equal_blocks_are_no_equal_values_where_one_side_is_merged(models: Mapping[str, Path]):
    """The base against itself: of the weights that the adapter changes, none is as it should be."""
    base = models["hf-mxfp4"]
    for adapter, blocks in (
        ("experts", {"attention", "experts"}),
        ("attention", {"attention", "router"}),
    ):
        asked = VerifyOptions(level="values", adapter=str(models[adapter]))
        findings = verify_checkpoints(base, base, asked).levels[-1].findings
        places = {(text.split()[1], text.split()[2].strip(":")) for text in findings}
        assert places == {(str(n), block) for n in range(4) for block in blocks}
        assert all("looks not merged;" in text for text in findings)


def test_peft_s_own_rounding_is_told_from_a_wrong_merge(models: Mapping[str, Path], tmp_path: Path):
    options = options_for("hf-bf16", models, "experts", adapter_arithmetic="peft")
    gptoss_convert.convert(models["hf-bf16"], tmp_path / "out", options)
    asked = VerifyOptions(level="values", adapter=str(models["experts"]))
    found = verify_checkpoints(models["hf-bf16"], tmp_path / "out", asked)
    texts = found.levels[-1].findings
    assert any("experts" in text for text in texts)
    assert all("looks merged, but rounded otherwise;" in text for text in texts), texts
    same = replace(asked, adapter_arithmetic="peft")
    assert verify_checkpoints(models["hf-bf16"], tmp_path / "out", same).same


def test_no_sidecar_remembers_scales_of_experts_that_were_changed(
    models: Mapping[str, Path], tmp_path: Path
):
    for adapter, kept in (("attention", True), ("experts", False)):
        target = tmp_path / adapter
        gptoss_convert.convert(models["hf-mxfp4"], target, options_for("hf-mxfp4", models, adapter))
        assert (target / "mxfp4-scales").exists() is kept


def test_a_sum_is_the_float64_sum_rounded_once(models: Mapping[str, Path]):
    """The sums of random float32 halves, against float64 and its own rounding to BF16."""
    halves = load_file(models["experts"] / "adapter_model.safetensors")
    stem = "base_model.model.model.layers.2"
    with (
        gptoss_convert.open(models["hf-bf16"]) as before,
        gptoss_convert.open(models["hf-bf16"], adapter=str(models["experts"])) as after,
    ):
        a, b = (halves[f"{stem}.self_attn.q_proj.lora_{h}.weight"].double() for h in "AB")
        weight = before["attention.q.weight"][2].flatten(0, 2).double()
        assert_rounded(weight + 4 * (b @ a), after["attention.q.weight"][2].flatten(0, 2))
        a, b = (halves[f"{stem}.mlp.experts.base_layer.lora_{h}.weight"].double() for h in "AB")
        experts = a.shape[0] // 3
        for expert in range(experts):
            own = b[:, expert::experts] @ a[3 * expert : 3 * expert + 3]
            weight = before["gate_up.weight"][2, expert].flatten(0, 1).double()
            assert_rounded(weight + 4 * own, after["gate_up.weight"][2, expert].flatten(0, 1))


def assert_rounded(exact: torch.Tensor, bf16: torch.Tensor) -> None:
    """No BF16 number is nearer to any element than the one that is there."""
    here = bf16.double()
    up, down = (
        torch.nextafter(bf16, torch.full_like(bf16, s * torch.inf)).double() for s in (1, -1)
    )
    error = (exact - here).abs()
    assert (error <= (exact - up).abs()).all() and (error <= (exact - down).abs()).all()


def test_the_manifest_and_the_report_say_what_was_merged(
    models: Mapping[str, Path], tmp_path: Path
):
    conversion = gptoss_convert.plan(
        models["hf-bf16"], tmp_path / "out", options_for("hf-bf16", models, "attention")
    )
    told = run(conversion).summary()["adapter"]
    written = json.loads((tmp_path / "out" / "gptoss-convert.json").read_text())["adapter"]
    # What is published does not say where on this machine an adapter lay.
    assert written == {**told, "path": models["attention"].name}
    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        content = (models["attention"] / name).read_bytes()
        digest.update(f"{name}\n{len(content)}\n".encode() + content)
    assert told["sha256"] == digest.hexdigest()
    assert (told["dialect"], told["written_by"], told["ranks"]) == ("peft", "PEFT 0.18.1", [3])
    assert told["layers"] == [0, 1, 2, 3]


def test_another_adapter_does_not_go_on_where_the_first_was_stopped(
    models: Mapping[str, Path], tmp_path: Path
):
    other = write_peft(tmp_path / "other", DISTINCT, [ATTENTION, ROUTER], seed=9)
    places = {**models, "other": other}
    first, second = (
        gptoss_convert.plan(
            models["hf-bf16"], tmp_path / "out", options_for("hf-bf16", places, adapter)
        ).header
        for adapter in ("attention", "other")
    )
    assert first["options"] == second["options"]
    assert first["adapter"]["sha256"] != second["adapter"]["sha256"]


def test_the_scale_option_multiplies_what_is_added(models: Mapping[str, Path]):
    adapter = str(models["attention"])
    with (
        gptoss_convert.open(models["hf-bf16"]) as base,
        gptoss_convert.open(models["hf-bf16"], adapter=adapter) as whole,
        gptoss_convert.open(
            models["hf-bf16"], adapter=AdapterOptions(adapter, adapter_scale=0.5)
        ) as half,
    ):
        name = "attention.v.weight"
        before, full, some = (one[name][1].float() for one in (base, whole, half))
        assert torch.allclose(some - before, (full - before) / 2, atol=2e-2)
        assert not torch.equal(some, full)


def test_memory_does_not_grow_with_the_number_of_layers(
    models: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
):
    def changes() -> Changes:
        target = models["hf-bf16"].parent / "none"
        options = options_for("hf-bf16", models, "experts")
        return gptoss_convert.plan(models["hf-bf16"], target, options).changes

    largest = 4 * 3 * 8 * (224 + 2 * 192)
    small = changes()
    assert small.worker_bytes == 4 * largest // 8  # an expert at a time
    assert small.shared_bytes > largest
    assert small.files_at_once is None  # all updates are kept
    monkeypatch.setattr(updates, "_SMALL", 0)
    assert changes().shared_bytes == 6 * largest
    assert changes().files_at_once == 3


def test_of_many_halves_those_used_last_are_kept_and_few_files_are_written_at_once(
    models: Mapping[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = options_for("hf-bf16", models, "experts")
    whole = gptoss_convert.plan(models["hf-bf16"], tmp_path / "whole", options)
    halves = {
        half
        for changes in whole.changes.by_weight.values()
        for found in changes[0].updates.values()  # pyright: ignore[reportAttributeAccessIssue]
        for update in found
        for half in update.factors
    }
    run(whole)
    monkeypatch.setattr(updates, "_SMALL", 0)
    asked: list[int | None] = []
    monkeypatch.setattr(
        run_module,
        "spread",
        lambda plan, mine, most: asked.append(most) or spread(plan, mine, most),
    )
    some = gptoss_convert.plan(models["hf-bf16"], tmp_path / "some", options)
    run(some)
    assert asked == [3]
    assert contents(tmp_path / "some") == contents(tmp_path / "whole")
    (merge,) = some.changes.by_weight["down.weight"]
    kept = merge.factors  # pyright: ignore[reportAttributeAccessIssue]
    most = sum(half.nbytes for half in halves) // 2
    monkeypatch.setattr(kept, "_most", most)
    for half in sorted(halves, key=lambda half: half.tensor):
        assert np.array_equal(kept[half], read_factor(half))
        assert sum(one.nbytes for one in kept._held) == kept._bytes <= most
        assert next(reversed(kept._held)) == half


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_copy_of_another_base_is_noted(tmp_path: Path):
    record = records("peft-0.21.2-transformers-5.24.0.json")["lm_head"]
    base = write_base(tmp_path / "base", "distinct")
    adapter = write_recorded(tmp_path / "adapter", record)
    options = Options(to="hf", adapter=str(adapter))
    notes = gptoss_convert.plan(base, tmp_path / "out", options).notes
    assert not [note for note in notes if "another base" in note]
    tensors = base_tensors("distinct")
    tensors["lm_head.weight"] = tensors["lm_head.weight"] * 2
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    (note,) = [
        n for n in gptoss_convert.plan(base, tmp_path / "out", options).notes if "another" in n
    ]
    assert "its copy of the base's lm_head.weight differs from this base's in 17 of 17 rows" in note


def test_whole_experts_on_an_mxfp4_base_take_the_place_of_its_blocks(tmp_path: Path):
    """`modules_to_save` on the experts: no block of the base may be left."""
    shape = DISTINCT
    weights = random_weights(shape, seed=5)
    base = write_hf_mxfp4(tmp_path / "base", shape, weights)
    whole: dict[str, torch.Tensor] = {}
    for n in range(shape.layers):
        stem = f"base_model.model.model.layers.{n}.mlp.experts"
        whole[f"{stem}.gate_up_proj"] = torch.full((8, 224, 384), 0.5 + n).bfloat16()
        whole[f"{stem}.down_proj"] = torch.full((8, 192, 224), 0.25 + n).bfloat16()
    adapter = tmp_path / "adapter"
    write_peft(adapter, shape, [ATTENTION])
    path = adapter / "adapter_model.safetensors"
    save_file({**load_file(path), **whole}, path)
    options = Options(to="hf", dtype="bf16", adapter=str(adapter), workers=1)
    planned = gptoss_convert.plan(base, tmp_path / "out", options)
    assert planned.source.adapter is not None
    assert all(one.file.identity for one in planned.source.adapter.replaced)
    run(planned)
    made = merged_tensors(tmp_path / "out")
    assert (made["model.layers.3.mlp.experts.gate_up_proj"] == 3.5).all()
    some = {name: tensor for name, tensor in whole.items() if ".layers.0." in name}
    save_file({**load_file(path), **some}, path)
    few = {k: v for k, v in load_file(path).items() if "experts" not in k or ".layers.0." in k}
    save_file(few, path)
    with pytest.raises(GptossError, match="of some layers whole, the base has it in MXFP4"):
        gptoss_convert.plan(base, tmp_path / "none", options)


def test_lengths_of_another_base_s_rows_are_noted(tmp_path: Path):
    """DoRA starts from the lengths of the rows of the base that it was trained on."""
    record = records("peft-0.21.2-transformers-5.24.0.json")["dora"]
    adapter = write_recorded(tmp_path / "adapter", record)
    base = write_base(tmp_path / "base", "distinct")
    held, path = base_tensors("distinct"), adapter / "adapter_model.safetensors"
    for factor, noted in ((1.02, False), (1.5, True)):
        lengths = {
            f"base_model.model.{name.removesuffix('.weight')}.lora_magnitude_vector": factor
            * tensor.float().norm(dim=1)
            for name, tensor in held.items()
            if "_proj.weight" in name
        }
        save_file(load_file(path) | lengths, path, {"format": "pt"})
        options = Options(to="hf", adapter=str(adapter))
        notes = gptoss_convert.plan(base, tmp_path / "out", options).notes
        assert any("DoRA lengths are 1.5 times" in note for note in notes) is noted, notes


def test_the_command_line_merges_inspects_and_verifies(models: Mapping[str, Path], tmp_path: Path):
    runner = CliRunner()
    base, adapter, out = map(str, (models["hf-bf16"], models["attention"], tmp_path / "out"))
    merged = runner.invoke(cli, ["convert", base, out, "--to", "hf", "--adapter", adapter])
    assert merged.exit_code == 0, merged.output
    judged = runner.invoke(
        cli, ["verify", base, out, "--adapter", adapter, "--level", "values", "--json"]
    )
    assert judged.exit_code == 0
    told = json.loads(judged.stdout)["source"]["adapter"]
    manifest = json.loads((tmp_path / "out" / "gptoss-convert.json").read_text())["adapter"]
    assert told == manifest | {"path": adapter} and told["dialect"] == "peft"
    page = tmp_path / "page"
    words = ["--adapter", adapter, "--level", "values", "--report", str(page)]
    shown = runner.invoke(cli, ["verify", base, out, *words]).stdout
    assert f"adapter  peft       {adapter}" in shown
    assert told["sha256"] in (page / "report.html").read_text()
    seen = runner.invoke(cli, ["inspect", adapter, "--base", base])
    assert "peft, written by PEFT 0.18.1" in seen.stdout
    assert "rank 3, alpha 12" in seen.stdout
    experts = json.loads(
        runner.invoke(cli, ["inspect", str(models["experts"]), "--base", base, "--json"]).stdout
    )
    assert (experts["layers"], experts["experts"]) == ([0, 1, 2, 3], [*range(8)])
    wrong = runner.invoke(cli, ["convert", base, out + "2", "--to", "hf", "--adapter-scale", "2"])
    assert isinstance(wrong.exception, UsageError)

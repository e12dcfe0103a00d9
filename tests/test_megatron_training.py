"""Training runs of megatron-core, from published weights to servable ones: what memory held, to the
bit, whoever held it, and experts that nobody trained are the published bytes.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from gptoss_convert import Options, convert, inspect
from gptoss_convert.cli.main import cli
from gptoss_convert.errors import CodecError, UsageError
from gptoss_convert.formats.checkpoint import Choices
from tests import megatron_recipes
from tests.megatron_arguments import recorded
from tests.megatron_cpu import Parallel, run_ranks
from tests.megatron_recipes import commands, way_back
from tests.megatron_training import STEPS, Run, train
from tests.megatron_witness import assert_same, gpt_model_parameters, safetensors_in
from tests.tiny_files import write_hf_mxfp4
from tests.tiny_models import TinyShape, hf_bf16_tensors, random_weights

SHAPE = TinyShape(
    layers=4,
    hidden=96,
    inter=64,
    heads=6,
    kv_heads=2,
    head_dim=16,
    experts=8,
    vocab=150,
    window=8,
    original_length=4096,
    beta_fast=32.0,
)
RUNS = {
    "data": Run(Parallel(), distributed=True, padded=256),
    "plain": Run(Parallel(), asynchronous=True),
    "experts": Run(Parallel(ep=2), distributed=True, reshardable=True),
    "stages": Run(Parallel(pp=2), keys="local"),
    "parts": Run(Parallel(pp=2, vpp=2), distributed=True, padded=256),
    "frozen": Run(Parallel(ep=2), frozen=".experts."),
}
TO_BF16 = Options(to="hf", dtype="bf16")
TO_MXFP4 = Options(to="hf", dtype="mxfp4")


def arguments() -> dict[str, Any]:
    """Megatron-LM's arguments as recorded, all of them, with the numbers of this model."""
    found: dict[str, Any] = recorded()["versions"]["core_v0.19.0"]["outcomes"]["20b"]["fields"]
    plain = {name: value for name, value in found.items() if not isinstance(value, dict)}
    return plain | {
        "num_layers": SHAPE.layers,
        "hidden_size": SHAPE.hidden,
        "ffn_hidden_size": SHAPE.inter,
        "moe_ffn_hidden_size": SHAPE.inter,
        "num_attention_heads": SHAPE.heads,
        "num_query_groups": SHAPE.kv_heads,
        "kv_channels": SHAPE.head_dim,
        "num_experts": SHAPE.experts,
        "window_size": (SHAPE.window - 1, 0),
        "padded_vocab_size": SHAPE.vocab,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Published weights, and what every run that started from them saved and remembers."""
    folder = tmp_path_factory.mktemp("training")
    weights = random_weights(SHAPE, seed=5)
    write_hf_mxfp4(folder / "published", SHAPE, weights)
    first = gpt_model_parameters(SHAPE, hf_bf16_tensors(weights))
    torch.save({name: weight.clone() for name, weight in first.items()}, folder / "first.pt")
    run_ranks(2, train, folder, SHAPE, RUNS, arguments())
    return folder


def told(options: Options, name: str) -> Options:
    """The options, with the rows of a padded vocabulary, which no argument states."""
    return replace(options, vocab_size=SHAPE.vocab if RUNS[name].padded else None)


def memory(run: Path) -> dict[str, torch.Tensor]:
    """The whole model, of what all ranks held; what two of them held is the same."""
    whole: dict[str, torch.Tensor] = {}
    for path in sorted(run.glob("memory-*.pt")):
        for name, weight in torch.load(path).items():
            assert torch.equal(whole.setdefault(name, weight), weight), name
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        whole[name] = whole[name][: SHAPE.vocab]
    return whole


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_back_as_memory_held_it(folder: Path, tmp_path: Path, name: str) -> None:
    convert(folder / name, tmp_path / "back", told(TO_BF16, name))
    back = safetensors_in(tmp_path / "back")
    assert_same(gpt_model_parameters(SHAPE, back), memory(folder / name))


@pytest.mark.parametrize("name", RUNS)
def test_inspect_tells_of_a_run(folder: Path, name: str) -> None:
    run = RUNS[name]
    if run.padded:
        with pytest.raises(UsageError, match="256 rows may hold padding; pass --vocab-size"):
            inspect(folder / name)
    found = inspect(folder / name, Choices(vocab_size=SHAPE.vocab)).summary()
    details, config = found["details"], found["config"]
    assert details["iteration"] == f"iter_{STEPS:07d}"
    assert details["optimizer"] and details["skipped"]["rng"] >= 1
    assert details["parallel"]["pipeline_model_parallel_size"] == run.parallel.pp
    assert details["parallel"]["expert_model_parallel_size"] == run.parallel.ep
    assert (config["vocab_size"], config["sliding_window"]) == (SHAPE.vocab, SHAPE.window)


def test_frozen_experts_are_the_published_bytes(folder: Path, tmp_path: Path) -> None:
    published = folder / "published"
    convert(folder / "frozen", tmp_path / "back", replace(TO_MXFP4, scales=published))
    back, before = safetensors_in(tmp_path / "back"), safetensors_in(published)
    experts = {name for name in before if ".experts." in name}
    assert len(experts) == 6 * SHAPE.layers
    assert_same({n: back[n] for n in experts}, {n: before[n] for n in experts})
    trained = {name for name in back if not torch.equal(back[name], before[name])}
    assert trained == back.keys() - experts


def test_a_run_and_what_it_became_are_one_model(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "back"
    convert(folder / "parts", target, told(TO_BF16, "parts"))
    words = ["verify", str(folder / "parts"), str(target), "--sample", "100"]
    done = CliRunner().invoke(cli, [*words, "--vocab-size-source", str(SHAPE.vocab)])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("same: max |Δlogit| 0 ")
    against = ["verify", str(folder / "published"), str(target), "--level", "values"]
    assert CliRunner().invoke(cli, against).exit_code == 1


def test_trained_experts_are_no_mxfp4_and_round_as_their_bf16_does(
    folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CodecError, match="not exact in MXFP4"):
        convert(folder / "experts", tmp_path / "packed", TO_MXFP4)
    convert(folder / "experts", tmp_path / "packed", replace(TO_MXFP4, lossy=True))
    convert(folder / "experts", tmp_path / "bf16", TO_BF16)
    convert(tmp_path / "bf16", tmp_path / "again", replace(TO_MXFP4, lossy=True))
    assert_same(safetensors_in(tmp_path / "packed"), safetensors_in(tmp_path / "again"))


@pytest.mark.parametrize("name", ["parts", "frozen"])
def test_the_recipe_leads_from_a_run_to_the_closing_verify(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    section = "Fine-tune with Megatron-LM"
    shutil.copytree(folder / "published", tmp_path / "gpt-oss-20b")
    shutil.copytree(folder / name, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    megatron_recipes.run(commands(section, "1. Convert"))
    *_, verified = megatron_recipes.run(way_back(section))
    assert verified.startswith("same: ")
    back = safetensors_in(tmp_path / "tuned-again")
    assert_same(gpt_model_parameters(SHAPE, back), memory(folder / name))

"""What Megatron-Bridge's own training saves comes back as its memory held it, wherever it lies."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from safetensors.torch import load_file

from gptoss_convert import Options, convert, inspect
from gptoss_convert.cli.main import cli
from tests import megatron_recipes
from tests.megatron_recipes import commands, way_back
from tests.megatron_witness import assert_same, gpt_model_parameters, safetensors_in
from tests.recorded import unpack
from tests.tiny_files import write_hf_mxfp4
from tests.tiny_models import TinyShape, random_weights

SHAPE = TinyShape(
    layers=4,
    hidden=32,
    inter=32,
    heads=4,
    kv_heads=2,
    head_dim=8,
    experts=4,
    vocab=40,
    window=8,
    original_length=4096,
    beta_fast=32.0,
)
"""As tests/recorded/README.md says."""
RUNS: dict[str, dict[str, int]] = {
    "bridge-0.3.1-tp2": {"tensor_model_parallel_size": 2},
    "bridge-0.6.0-pp2": {"pipeline_model_parallel_size": 2},
    "bridge-0.6.0-ep2": {"expert_model_parallel_size": 2},
    "bridge-0.6.0-async": {"pipeline_model_parallel_size": 2},
}
TO_BF16 = Options(to="hf", dtype="bf16")
HF = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("bridge-runs.tar.xz", tmp_path_factory.mktemp("recorded"))


def assert_remembered(runs: Path, name: str, converted: Path) -> None:
    remembered = load_file(runs / "memory" / f"{name}.safetensors")
    assert_same(gpt_model_parameters(SHAPE, safetensors_in(converted)), remembered)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_comes_back_as_memory_held_it(runs: Path, tmp_path: Path, name: str) -> None:
    convert(runs / name, tmp_path / "t", TO_BF16)
    assert_remembered(runs, name, tmp_path / "t")


@pytest.mark.parametrize("name", RUNS)
def test_inspect_tells_of_a_run(runs: Path, name: str) -> None:
    found = inspect(runs / name).summary()
    details, config = found["details"], found["config"]
    assert (details["iteration"], details["saved_by"]) == ("iter_0000002", "Megatron-Bridge")
    assert details["optimizer"] == (name in ("bridge-0.6.0-pp2", "bridge-0.6.0-ep2"))
    assert details["skipped"]["rng"] == 2
    sizes = {key: size for key, size in details["parallel"].items() if size > 1}
    assert sizes == RUNS[name]
    assert (config["sliding_window"], config["vocab_size"]) == (8, SHAPE.vocab)
    assert (config["rope_theta"], config["original_max_position_embeddings"]) == (150000.0, 4096)


def test_a_run_and_what_it_became_are_one_model(runs: Path, tmp_path: Path) -> None:
    convert(runs / "bridge-0.6.0-ep2", tmp_path / "t", TO_BF16)
    words = ["verify", str(runs / "bridge-0.6.0-ep2"), str(tmp_path / "t"), "--sample", "100"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("same: max |Δlogit| 0 ")


def arranged(runs: Path, root: Path, places: dict[str, tuple[str, ...]]) -> Path:
    """The run as Bridge's options arrange it: files of the Hugging Face side in these places."""
    shutil.copytree(runs / "bridge-0.6.0-pp2", root)
    for place, names in places.items():
        folder = root / place
        folder.mkdir()
        for name in names:
            shutil.copy(runs / "hf" / name, folder / name)
    return root


PLACES = {
    "hf in the root": ({"hf": HF}, "hf"),
    "hf in the iteration": ({"iter_0000002/hf": HF}, "iter_0000002/hf"),
    "tokenizer in the iteration": ({"iter_0000002/tokenizer": HF[1:]}, "iter_0000002/run_config"),
}


@pytest.mark.parametrize("what", PLACES)
def test_what_lies_beside_a_run_is_found(runs: Path, tmp_path: Path, what: str) -> None:
    places, source = PLACES[what]
    root = arranged(runs, tmp_path / "run", places)
    assert inspect(root).summary()["details"]["configuration"].startswith(f"{root}/{source}")
    convert(root, tmp_path / "t", TO_BF16)
    assert_remembered(runs, "bridge-0.6.0-pp2", tmp_path / "t")
    for name in HF[1:]:
        assert (tmp_path / "t" / name).read_bytes() == (runs / "hf" / name).read_bytes()
    words = ["verify", str(root), str(tmp_path / "t"), "--level", "values"]
    assert CliRunner().invoke(cli, words).exit_code == 0


def test_the_configuration_of_the_iteration_comes_first(runs: Path, tmp_path: Path) -> None:
    root = arranged(runs, tmp_path / "run", {"hf": HF, "iter_0000002/hf": HF})
    path = root / "hf" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sliding_window": 4}))
    convert(root, tmp_path / "t", TO_BF16)
    config: dict[str, Any] = json.loads((tmp_path / "t" / "config.json").read_text())
    assert config["sliding_window"] == 8


@pytest.mark.parametrize("tracker", ["release", None])
def test_a_release_is_an_iteration(runs: Path, tmp_path: Path, tracker: str | None) -> None:
    root = arranged(runs, tmp_path / "run", {})
    (root / "iter_0000002").rename(root / "release")
    place = root / "latest_checkpointed_iteration.txt"
    place.unlink()
    if tracker:
        place.write_text(tracker)
    assert inspect(root).summary()["details"]["iteration"] == "release"
    convert(root, tmp_path / "t", TO_BF16)
    assert_remembered(runs, "bridge-0.6.0-pp2", tmp_path / "t")


def test_of_several_iterations_the_latest_or_the_one_asked_for(runs: Path, tmp_path: Path) -> None:
    root = arranged(runs, tmp_path / "run", {})
    shutil.copytree(runs / "bridge-0.6.0-ep2" / "iter_0000002", root / "iter_0000001")
    convert(root, tmp_path / "latest", TO_BF16)
    assert_remembered(runs, "bridge-0.6.0-pp2", tmp_path / "latest")
    convert(root, tmp_path / "first", replace(TO_BF16, iteration=1))
    assert_remembered(runs, "bridge-0.6.0-ep2", tmp_path / "first")


@pytest.mark.parametrize("name", RUNS)
def test_the_recipe_leads_from_a_run_to_the_closing_verify(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    section = "Fine-tune with Megatron-Bridge"
    write_hf_mxfp4(tmp_path / "gpt-oss-20b", SHAPE, random_weights(SHAPE, seed=9))
    shutil.copytree(runs / name, tmp_path / "bridge-run")
    monkeypatch.chdir(tmp_path)
    megatron_recipes.run(commands(section, "1. Convert"))
    *_, verified = megatron_recipes.run(way_back(section))
    assert verified.startswith("same: ")
    assert_remembered(runs, name, tmp_path / "from-bridge")

"""What several ranks save by the libraries' own code comes out as the state dict they had."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptoss_convert import Options, convert
from gptoss_convert.check.inspection import inspect
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions

ROOT = Path(__file__).parents[1]
FORMS = {
    "checkpoint-1": "trained",
    "app": "trained",
    "plain": "plain",
    "ep": "plain",
    "shards": "plain",
    "fsdp2": "plain",
    "hsdp": "plain",
    "fsdp1": "plain",
    "fsdp1-mesh": "plain",
}
"""What was saved, and the file with the state dict that it had."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One launch of four ranks makes every form."""
    folder = tmp_path_factory.mktemp("ranks")
    words = [sys.executable, "-W", "ignore", "-m", "tests.trainer_ranks", str(folder)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


def converted(source: Path, target: Path, config: Path) -> Path:
    convert(source, target, Options("hf", config=config, workers=1))
    return target


def verdict(source: Path, target: Path, config: Path, level: str) -> str:
    choices = Choices(config=config)
    asked = VerifyOptions(level=level, source=choices, device="cpu", workers=1, sample=60)
    return verify_checkpoints(source, target, asked).verdict


@pytest.mark.parametrize("form", FORMS)
def test_every_form_comes_out_as_it_was_saved(made: Path, tmp_path: Path, form: str):
    out = converted(made / form, tmp_path / "out", made / "config.json")
    expected, found = (
        load_file(file) for file in (made / f"{FORMS[form]}.safetensors", out / "model.safetensors")
    )
    assert found.keys() == expected.keys()
    assert not [name for name, one in expected.items() if not torch.equal(found[name], one)]


@pytest.mark.parametrize(
    ("form", "writer", "prefix", "skipped"),
    [
        ("checkpoint-1", "accelerate (Trainer, TRL, axolotl) with FSDP", "model.", set()),
        ("app", "torch.distributed.checkpoint", "app.model.", {"optimizer"}),
        ("ep", "torch.distributed.checkpoint", "model.", set()),
        ("shards", "torch.distributed.checkpoint (NeMo Automodel, torchtitan)", "", set()),
    ],
)
def test_inspect_tells_form_writer_and_what_was_skipped(
    made: Path, form: str, writer: str, prefix: str, skipped: set[str]
):
    details = inspect(made / form, Choices(config=made / "config.json")).summary()["details"]
    told = (details["written_by"], details["prefix"], {*details["skipped"]})
    assert told == (writer, prefix, skipped)


def test_an_optimizer_s_folder_is_told_by_what_it_is(made: Path):
    with pytest.raises(InputError, match="no weights, only a trainer's state"):
        inspect(made / "checkpoint-1" / "optimizer_0", Choices(config=made / "config.json"))


@pytest.mark.parametrize("form", ["plain", "shards"])
def test_the_files_of_another_save_are_seen_by_verify(made: Path, tmp_path: Path, form: str):
    config = made / "config.json"
    good = converted(made / form, tmp_path / "good", config)
    assert verdict(made / form, good, config, "logits").startswith("same")
    stale = shutil.copytree(made / form, tmp_path / "stale")
    name = sorted(path.name for path in (made / f"{form}-later").iterdir())[1]
    shutil.copyfile(made / f"{form}-later" / name, stale / name)
    assert verdict(stale, good, config, "values").startswith("different")
    assert verdict(stale, good, config, "logits").startswith("different")


@pytest.mark.parametrize("form", ["plain", "shards"])
def test_a_rank_s_missing_file_is_told(made: Path, tmp_path: Path, form: str):
    lost = shutil.copytree(made / form, tmp_path / "lost")
    name = sorted(path.name for path in lost.iterdir() if not path.name.startswith("."))[2]
    (lost / name).unlink()
    with pytest.raises(IntegrityError, match="missing"):
        inspect(lost, Choices(config=made / "config.json"))

"""No configuration ends a command in a traceback, and what is converted is the same model."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from gptoss_convert import __main__ as entry
from gptoss_convert.errors import InputError
from gptoss_convert.formats import config as configs
from gptoss_convert.formats.config.keys import KEYS, Use
from tests import odd_models
from tests.test_config_keys import ODD, applied, objects

Run = Callable[..., tuple[int, str]]

SIZES = {name for name, key in KEYS.items() if key.use is Use.READ} - {"swiglu_limit"}
SIZES -= {"rms_norm_eps", "rope_theta", "max_position_embeddings", "num_experts_per_tok"}
ANY = objects(ODD)
KEPT = objects({name: ODD[name] for name in ODD if name not in SIZES})
VERIFY = ("--device", "cpu", "--workers", "1", "--sample", "20", "--max-length", "20")

few = settings(
    deadline=None,
    derandomize=True,
    # A command takes its time: the first failing example must do.
    phases=[Phase.generate],
    database=None,
    suppress_health_check=[
        HealthCheck.too_slow,
        HealthCheck.function_scoped_fixture,
        HealthCheck.filter_too_much,
    ],
)


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_command(*words: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["gptoss-convert", *map(str, words)])
        status = entry._run()
        shown = capsys.readouterr()
        assert status != 70, shown.err
        assert "Traceback" not in shown.err
        return status, shown.out + shown.err

    return run_command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return odd_models.save(tmp_path_factory.mktemp("model") / "model")


def edited(model: Path, place: Path, odd: dict[str, Any]) -> Path:
    """The model with other values in its config.json."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(model, place)
    path = place / "config.json"
    path.write_text(json.dumps(applied(json.loads(path.read_text()), odd)))
    return place


@given(ANY)
@settings(few, max_examples=30)
def test_every_command_takes_or_refuses_a_configuration_in_one_line(
    model: Path, tmp_path: Path, command: Run, odd: dict[str, Any]
):
    source = edited(model, tmp_path / "source", odd)
    statuses = [
        command("inspect", source)[0],
        command("check", source)[0],
        command("diff", source, source, "--workers", "1")[0],
        command("verify", source, source, "--level", "header")[0],
        command("convert", source, tmp_path / "target", "--to", "hf", "--dry-run")[0],
        command("convert", source, tmp_path / "target", "--to", "megatron", "--dry-run")[0],
    ]
    # Megatron has no words for some numbers, all else is one judgement.
    assert set(statuses[:-1]) in ({0}, {2}, {3}, {4}), statuses


def legal(model: Path, odd: dict[str, Any]) -> bool:
    try:
        content = applied(json.loads((model / "config.json").read_text()), odd)
        found = configs.from_hf("config.json", content)
    except InputError:
        return False
    # Prompts reach beyond the original length, which must not take minutes.
    return found.original_max_position_embeddings <= 512


@given(st.data())
@settings(few, max_examples=6)
def test_what_is_converted_is_the_same_model_at_every_level(
    model: Path, tmp_path: Path, command: Run, data: st.DataObject
):
    odd = data.draw(KEPT.filter(lambda one: legal(model, one)))
    source, target = edited(model, tmp_path / "source", odd), tmp_path / "target"
    shutil.rmtree(target, ignore_errors=True)
    status, shown = command("convert", source, target, "--to", "hf", "--workers", "1")
    assert status == 0, shown
    status, shown = command("verify", source, target, "--level", "logits", *VERIFY)
    assert status == 0, shown
    # TARGET has its own model code's logits; of SOURCE transformers may refuse the directory.
    status, shown = command("verify", target, target, "--level", "oracle", *VERIFY)
    assert status == 0, shown
    status, shown = command("verify", source, target, "--level", "oracle", *VERIFY)
    assert status == 0 or "its own model code refuses it" in shown


@pytest.mark.parametrize("level", ["header", "values", "logits", "oracle"])
@pytest.mark.parametrize("chosen", [5, 4, 1])
def test_experts_a_token_of_every_number(
    model: Path, tmp_path: Path, command: Run, level: str, chosen: int
):
    source = edited(model, tmp_path / "source", {"num_experts_per_tok": chosen})
    status, shown = command("verify", source, source, "--level", level, *VERIFY)
    assert status == (3 if chosen == 5 else 0), shown

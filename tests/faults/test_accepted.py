"""What looks odd and is no fault: accepted, with the same weights as the plain directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.conversion.manifest import read_manifest
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.synth.synth import synth
from tests.faults.cases import INDEX, SHARD, edit_config, edit_json, header_of, write_header


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("accepted")
    synth(folder / "one", layers=1, workers=1)
    run(plan(folder / "one", folder / "many", Options("hf", workers=1, max_shard_size=700_000)))
    return folder


def without_index(path: Path) -> None:
    (path / INDEX).unlink()


def misaligned(path: Path) -> None:
    """A header of odd length: no tensor begins at an even byte."""
    header, rest = header_of(path / SHARD)
    text = json.dumps(header).encode()
    write_header(path / SHARD, text + b" " * (1 + len(text) % 2), rest)


def fsdp_architecture(path: Path) -> None:
    edit_config(path, architectures=["FSDPGptOssForCausalLM"])


def renamed_fine_tune(path: Path) -> None:
    edit_config(path, architectures=["GptOssForCausalLM"], _name_or_path="gpt-oss-safeguard-20b")


def new_rope_only(path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        del content["rope_scaling"], content["rope_theta"]

    edit_json(path / "config.json", edit)


def old_rope_only(path: Path) -> None:
    edit_json(path / "config.json", lambda content: content.pop("rope_parameters"))


def no_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("start", "change"),
    [
        ("many", without_index),
        ("one", misaligned),
        ("one", fsdp_architecture),
        ("one", renamed_fine_tune),
        ("one", new_rope_only),
        ("one", old_rope_only),
        ("one", no_tokenizer),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_it_is_accepted(
    made: Path, tmp_path: Path, start: str, change: Callable[[Path], None]
) -> None:
    source = tmp_path / "source"
    shutil.copytree(made / start, source)
    change(source)
    for name, options in (
        ("hf", Options("hf", workers=1)),
        ("bf16", Options("hf", "bf16", workers=1)),
    ):
        run(plan(source, tmp_path / name, options))
        found, expected = read_manifest(tmp_path / name), read_manifest(made / "one")
        assert found is not None
        assert expected is not None
        assert found.layers == expected.layers


def test_another_architecture_is_noted(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "one", tmp_path / "source")
    fsdp_architecture(tmp_path / "source")
    notes = plan(tmp_path / "source", tmp_path / "target", Options("hf")).notes
    assert notes == ("architectures is ['FSDPGptOssForCausalLM']: read as GptOssForCausalLM",)


def test_a_missing_tokenizer_is_noted(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "one", tmp_path / "source")
    no_tokenizer(tmp_path / "source")
    notes = plan(tmp_path / "source", tmp_path / "target", Options("hf")).notes
    assert notes == ("no tokenizer.json: SOURCE has none; pass --tokenizer DIR to add them",)

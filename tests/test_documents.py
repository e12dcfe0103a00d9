"""Every command's JSON follows the schema it names, and docs/json.md lists every key of it."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from gptoss_convert.cli.main import cli
from gptoss_convert.show.documents import VERSIONS, document
from gptoss_convert.synth.synth import synth
from tests.tiny_adapters import ATTENTION, SYNTHETIC, write_peft

DOCS = Path(__file__).parent.parent / "docs"
SCHEMAS: Mapping[str, Any] = {
    kind: json.loads((DOCS / "schemas" / f"{kind}-{version}.json").read_text(encoding="utf-8"))
    for kind, version in VERSIONS.items()
}


def follows_its_schema(text: str) -> dict[str, Any]:
    """The one document that a text is, valid by the schema that it names."""
    content = json.loads(text, parse_constant=pytest.fail)
    program, kind, version = content["schema"].split("/")
    assert (program, int(version)) == ("gptoss-convert", VERSIONS[kind])
    Draft202012Validator(SCHEMAS[kind]).validate(content)
    return content


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    synth(folder / "mxfp4")
    synth(folder / "other", seed=1)
    synth(folder / "megatron", format="megatron")
    synth(folder / "bf16", dtype="bf16")
    write_peft(folder / "lora", SYNTHETIC, [ATTENTION])
    (folder / "empty").mkdir()
    (folder / "damaged").mkdir()
    for path in (folder / "mxfp4").iterdir():
        shutil.copy(path, folder / "damaged")
    with (folder / "damaged" / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    return folder


COMMANDS = {
    "inspect mxfp4": ("inspect", 0),
    "inspect megatron": ("inspect", 0),
    "convert mxfp4 out --to hf --dtype bf16 --dry-run": ("plan", 0),
    "convert bf16 back --to hf --dtype mxfp4": ("convert", 0),
    "convert mxfp4 original --to openai -q": ("convert", 0),
    "synth synthetic --layers 1": ("convert", 0),
    "inspect lora": ("adapter", 0),
    "inspect lora --base mxfp4": ("adapter", 0),
    "convert mxfp4 merged --to hf --adapter lora --dry-run": ("plan", 0),
    "convert mxfp4 merged --to hf --adapter lora -q": ("convert", 0),
    "verify mxfp4 mxfp4 --adapter lora --level values": ("verify", 1),
    "check mxfp4": ("check", 0),
    "check mxfp4 --read-data-subset 5%": ("check", 0),
    "check damaged --read-data": ("check", 4),
    "diff mxfp4 bf16": ("diff", 0),
    "diff mxfp4 other": ("diff", 1),
    "diff megatron other": ("diff", 1),
    "verify mxfp4 bf16 --sample 40": ("verify", 0),
    "verify mxfp4 other --sample 40 --prompt hello": ("verify", 1),
    "verify mxfp4 other --level values --report pages": ("verify", 1),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_result_follows_its_schema(
    folder: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    kind, status = COMMANDS[command]
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(cli, [*command.split(), "--json"])
    assert done.exit_code == status, done.stderr
    assert follows_its_schema(done.stdout)["schema"].split("/")[1] == kind


def test_a_verification_is_the_same_in_a_file(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    file = tmp_path / "verify.json"
    command = ["verify", "mxfp4", "other", "--level", "values", "--json", str(file)]
    done = CliRunner().invoke(cli, command)
    found = follows_its_schema(file.read_text(encoding="utf-8"))
    assert not found["same"]
    assert found["verdict"] == done.stdout.splitlines()[0]
    assert found["levels"][1]["numbers"]["differences"]


ERRORS = {
    "inspect nowhere": 2,
    "inspect": 2,
    "inspect mxfp4 --iteration x": 2,
    "check empty": 3,
    "convert mxfp4 bf16 --to hf": 8,
    "verify mxfp4 nowhere": 2,
}


@pytest.mark.parametrize("command", ERRORS)
def test_an_error_is_a_document_on_stdout_and_a_line_on_stderr(folder: Path, command: str) -> None:
    words = [sys.executable, "-m", "gptoss_convert", *command.split(), "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=folder)
    told = follows_its_schema(done.stdout)
    assert told["schema"] == "gptoss-convert/error/1"
    assert done.returncode == told["exit_code"] == ERRORS[command]
    assert done.stderr.splitlines()[-1].lower() == f"error: {told['error']}".lower()


def test_a_word_after_two_dashes_asks_for_nothing(folder: Path) -> None:
    words = [sys.executable, "-m", "gptoss_convert", "inspect", "--", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")


def test_an_error_is_not_printed_where_a_file_was_asked_for(folder: Path) -> None:
    words = [sys.executable, "-m", "gptoss_convert", "verify", "mxfp4", "nowhere"]
    words += ["--json", "v.json", "--level", "header"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")


def test_what_json_has_no_number_for_is_a_word() -> None:
    content = {"error": [math.nan, -math.inf, 1.5], "exit_code": (math.inf,)}
    found = json.loads(document("error", content))
    assert (found["error"], found["exit_code"]) == (["NaN", "-Infinity", 1.5], ["Infinity"])


def objects(schema: Any) -> Iterator[dict[str, Any]]:
    """Every part of a schema that describes an object by its keys."""
    if isinstance(schema, dict):
        if "properties" in schema and schema.get("type") == "object":
            yield schema
        for part in schema.values():
            yield from objects(part)
    elif isinstance(schema, list):
        for part in schema:
            yield from objects(part)


@pytest.mark.parametrize("kind", VERSIONS)
def test_schemas_name_every_key_and_allow_no_other(kind: str) -> None:
    schema = SCHEMAS[kind]
    Draft202012Validator.check_schema(schema)
    identity = f"gptoss-convert/{kind}/{VERSIONS[kind]}"
    assert schema["$id"] == schema["properties"]["schema"]["const"] == identity
    for part in objects(schema):
        assert part["additionalProperties"] is False
        if part is not schema["properties"].get("details"):
            assert part["required"] == list(part["properties"])


@pytest.mark.parametrize("kind", VERSIONS)
def test_the_page_lists_every_key_with_the_words_of_the_schema(kind: str) -> None:
    text = (DOCS / "json.md").read_text(encoding="utf-8")
    section = text.partition(f"\n## {kind}\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", section, re.MULTILINE)
    keys = {name: part["description"] for name, part in SCHEMAS[kind]["properties"].items()}
    assert dict(rows) == keys
    assert f"(schemas/{kind}-{VERSIONS[kind]}.json)" in section


def test_no_schema_lies_there_that_no_document_has() -> None:
    names = {f"{kind}-{version}.json" for kind, version in VERSIONS.items()}
    assert {path.name for path in (DOCS / "schemas").iterdir()} == names

"""The gate: verdicts, every pair of formats, wrong tables, statuses and reports of the command."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import combinations
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch

from gptoss_convert import convert, verify_checkpoints
from gptoss_convert.conversion.options import Options
from gptoss_convert.errors import InputError, ResourceError, UsageError
from gptoss_convert.layouts import table_files
from gptoss_convert.show.documents import document
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify import logits_level as forward_levels
from gptoss_convert.verify import oracle_level
from gptoss_convert.verify.result import Verification, VerifyOptions
from gptoss_convert.witness import oracles
from tests.test_documents import follows_its_schema

FORMATS = ("mxfp4", "bf16", "openai", "megatron")
NAMES = {"mxfp4": "hf-mxfp4", "bf16": "hf-bf16", "openai": "openai", "megatron": "megatron"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same tiny model in every format."""
    folder = tmp_path_factory.mktemp("tiny")
    synth(folder / "mxfp4")
    convert(folder / "mxfp4", folder / "bf16", Options(to="hf", dtype="bf16"))
    convert(folder / "mxfp4", folder / "openai", Options(to="openai"))
    convert(folder / "mxfp4", folder / "megatron", Options(to="megatron"))
    return folder


def verified(source: Path, target: Path, **options: object) -> Verification:
    chosen = {"device": "cpu", "both": True} | options
    return verify_checkpoints(source, target, VerifyOptions(**chosen))  # pyright: ignore[reportArgumentType]


def rewritten(folder: Path, copy: Path, old: str, new: str) -> Path:
    """A copy of a checkpoint with a text replaced in its config.json."""
    copy.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (copy / path.name).write_bytes(path.read_bytes())
    text = (copy / "config.json").read_text()
    assert old in text
    (copy / "config.json").write_text(text.replace(old, new))
    return copy


@pytest.mark.parametrize(("source", "target"), [*combinations(FORMATS, 2)])
def test_every_pair_of_formats_is_the_same_model(tiny: Path, source: str, target: str) -> None:
    found = verified(tiny / source, tiny / target)
    assert found.same
    assert [level.name for level in found.levels] == ["header", "values", "logits"]
    assert found.verdict.startswith("same: max |Δlogit| 0 at ")
    assert (found.source["format"], found.target["format"]) == (NAMES[source], NAMES[target])
    numbers = found.levels[2].numbers
    assert numbers["overall"]["max_delta"] == 0
    assert all(layer["cold_experts"] == () for layer in numbers["layers"])
    assert json.loads(json.dumps(found.summary()))["same"] is True


def test_the_ecosystems_own_models_agree(tiny: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = verified(tiny / "bf16", tiny / "megatron", level="oracle", sample=140)
    assert found.same, found.verdict
    assert capfd.readouterr() == ("", "")
    follows_its_schema(document("verify", found.summary()))
    for side in found.levels[3].numbers.values():
        assert side["positions"] == side["settled"] >= 128
        assert 0 < side["max_delta"] < side["limit"] < 2e-4


def test_an_oracle_that_computes_otherwise_is_a_difference(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(*arguments: Any) -> list[Any]:
        return [one + 1e-3 for one in oracles.transformers_logits(*arguments)]

    monkeypatch.setattr(oracle_level, "oracle_logits", lambda side, _, seqs, device: other(
        side.root, seqs, device))  # fmt: skip
    found = verified(tiny / "bf16", tiny / "bf16", level="oracle", sample=40)
    assert not found.same
    assert "its own model code gives other logits" in found.verdict


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ('"sliding_window": 16', '"sliding_window": 15', "sliding_window is 16 in SOURCE, 15 in"),
        (
            '"rms_norm_eps": 1e-05',
            '"rms_norm_eps": 1e-06',
            "rms_norm_eps is 1e-05 in SOURCE, 1e-06",
        ),
    ],
)
def test_numbers_that_differ_end_at_the_header(
    tiny: Path, tmp_path: Path, old: str, new: str, says: str
) -> None:
    found = verified(tiny / "bf16", rewritten(tiny / "bf16", tmp_path / "other", old, new))
    assert not found.same
    assert found.verdict.startswith(f"different: {says}")
    assert [level.name for level in found.levels] == ["header"]


MCORE = "decoder.layers"
FC1 = f"{MCORE}.mlp.experts.experts.linear_fc1.weight"
WRONG_RULES = {
    "gate and up interleaved": (FC1, "layer expert (inter glu) hidden", "experts"),
    "groups before kv heads": (
        f"{MCORE}.self_attention.linear_proj.weight",
        "layer hidden (group kv_head head_dim)",
        "attention",
    ),
    "sinks by group": (
        f"{MCORE}.self_attention.core_attention.softmax_offset",
        "layer (group kv_head)",
        "attention",
    ),
}


@pytest.fixture
def wrong_table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Sets one layout of Megatron's table, for the program alone."""
    original = table_files.read_toml

    def set_layout(tensor: str, layout: str) -> None:
        def edited(name: str) -> dict[str, object]:
            content = original(name)
            if name == "megatron.toml":
                rule = find_rule(content, tensor)
                rule["layout"] = layout
                rule.pop("chunk", None)
            return content

        monkeypatch.setattr(table_files, "read_toml", edited)
        table_files.load_table.cache_clear()

    yield set_layout
    table_files.load_table.cache_clear()


def find_rule(content: dict[str, object], tensor: str) -> dict[str, object]:
    """The rule of a tensor, in whichever section of a table."""
    for name, section in content.items():
        if name == tensor:
            assert isinstance(section, dict)
            return section
        if isinstance(section, dict):
            with suppress(KeyError):
                return find_rule(section, tensor)
    raise KeyError(tensor)


@pytest.mark.parametrize(("tensor", "layout", "block"), [*WRONG_RULES.values()], ids=[*WRONG_RULES])
def test_a_wrong_table_passes_values_and_fails_logits(
    tiny: Path, tmp_path: Path, wrong_table: Callable[[str, str], None],
    tensor: str, layout: str, block: str,
) -> None:  # fmt: skip
    """The route there and back through the wrong table is clean: only the readers can tell."""
    wrong_table(tensor, layout)
    target = tmp_path / "megatron"
    convert(tiny / "mxfp4", target, Options(to="megatron"))
    convert(target, tmp_path / "back", Options(to="hf", dtype="mxfp4"))
    weights = "model.safetensors"
    assert (tmp_path / "back" / weights).read_bytes() == (tiny / "mxfp4" / weights).read_bytes()
    found = verified(tiny / "mxfp4", target)
    assert [level.same for level in found.levels] == [True, True, False]
    assert found.verdict.startswith(f"different: layer 0 {block}: relative error ")
    assert f"{tensor}[0]" in found.verdict


def test_more_than_rounding_fails_and_less_passes_under_limits(tiny: Path, tmp_path: Path) -> None:
    other = synth_again(tmp_path / "other", seed=1)
    assert not verified(tiny / "mxfp4", other, limits="float32").same
    found = verified(tiny / "mxfp4", tiny / "bf16", limits="float32")
    assert found.verdict.endswith(", within the limits 'float32'")


def synth_again(target: Path, seed: int) -> Path:
    synth(target, seed=seed)
    return target


def test_a_file_that_is_no_tokenizer_is_named(tiny: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny / "mxfp4", tmp_path / "source")
    (tmp_path / "source" / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(InputError, match=r"tokenizer\.json: no tokenizer: "):
        verified(tmp_path / "source", tiny / "openai", prompt="hello", sample=1)


def test_a_prompt_shows_the_next_tokens_of_both(tiny: Path) -> None:
    found = verified(tiny / "mxfp4", tiny / "openai", prompt="hello", sample=1)
    numbers = found.levels[2].numbers
    (shown,) = numbers["next_tokens"]
    assert shown["source"] == shown["target"]
    assert len(shown["source"]) == len(numbers["next_tokens_text"]) == 5
    assert sum(p for _, p in shown["source"]) < 1


def test_tokens_of_ones_own_replace_the_set(tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('[1, 2, 3]\n"text"\n')
    numbers = verified(tiny / "mxfp4", tiny / "bf16", tokens=path).levels[2].numbers
    assert numbers["worst_delta"]["sequence"].startswith("own.jsonl:")
    path.write_text("[1, 288]\n")
    with pytest.raises(InputError, match=r"own\.jsonl:1: expects ids from 0 to 287"):
        verified(tiny / "mxfp4", tiny / "bf16", tokens=path)
    path.write_text("{}\n")
    with pytest.raises(InputError, match=r"own\.jsonl:1: expects a list of token ids or a string"):
        verified(tiny / "mxfp4", tiny / "bf16", tokens=path)


def test_fewer_layers_are_fewer_values_and_shorter_models(tiny: Path) -> None:
    whole = verified(tiny / "mxfp4", tiny / "megatron", sample=1)
    half = verified(tiny / "mxfp4", tiny / "megatron", layers=2, sample=1)
    assert half.same
    assert len(half.levels[2].numbers["layers"]) == 2
    assert half.levels[1].numbers["elements"] < whole.levels[1].numbers["elements"]


def test_a_gpu_that_is_too_small_is_a_resource_error(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(forward_levels, "compare", full)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1_000_000_000, 24_000_000_000))
    with pytest.raises(ResourceError, match=r"GPU memory: 1\.0 of 24\.0 GB free.*--max-length"):
        verified(tiny / "mxfp4", tiny / "bf16")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"level": "deep"}, "--level deep: choose header, values, logits, oracle"),
        ({"limits": "loose"}, "limits: expects one of"),
    ],
)
def test_wrong_options_list_the_choices(
    tiny: Path, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        verified(tiny / "mxfp4", tiny / "bf16", **options)


def command(*words: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "gptoss_convert", "verify", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_the_command_says_the_answer_first_and_in_its_status(tiny: Path, tmp_path: Path) -> None:
    files = ("--json", tmp_path / "v.json", "--junit", tmp_path / "v.xml", "--level", "values")
    same = command(tiny / "mxfp4", tiny / "megatron", *files)
    assert same.returncode == 0, same.stderr
    assert same.stdout.startswith("same: all 4,632,124 values equal, bit by bit\n")
    assert json.loads((tmp_path / "v.json").read_text())["same"] is True
    assert ElementTree.parse(tmp_path / "v.xml").getroot().attrib["failures"] == "0"
    other = synth_again(tmp_path / "other", seed=1)
    different = command(tiny / "mxfp4", other, *files)
    assert different.returncode == 1
    assert different.stdout.startswith("different: embedding: model.embed_tokens.weight differs;")
    suite = ElementTree.parse(tmp_path / "v.xml").getroot()
    assert [case.attrib["name"] for case in suite.findall("testcase")] == ["header", "values"]
    assert suite.attrib["failures"] == "1"
    missing = command(tiny / "mxfp4", tmp_path / "nothing")
    assert (missing.returncode, missing.stdout) == (2, "")


def test_header_and_values_do_without_torch(tiny: Path) -> None:
    code = (
        "import sys\n"
        "sys.modules['torch'] = None\n"
        "from gptoss_convert import verify_checkpoints, GptossError\n"
        "from gptoss_convert.verify.result import VerifyOptions\n"
        f"source, target = {str(tiny / 'mxfp4')!r}, {str(tiny / 'megatron')!r}\n"
        "assert verify_checkpoints(source, target, VerifyOptions(level='values')).same\n"
        "try:\n"
        "    verify_checkpoints(source, target)\n"
        "except GptossError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("--level logits needs torch")


def test_witnesses_import_no_table() -> None:
    code = (
        "import sys, importlib, pkgutil, gptoss_convert.witness as witness\n"
        "names = [one.name for one in pkgutil.iter_modules(witness.__path__)]\n"
        # Triton, which the GPU's kernels are written in, is there with a GPU only.
        "for name in set(names) - {'kernels'}:\n"
        "    importlib.import_module(f'gptoss_convert.witness.{name}')\n"
        "print(*sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "gptoss_convert.witness.forward" in done.stdout.split()
    wings = ("layouts", "engine", "formats", "codecs", "conversion", "compare")
    found = [name for name in done.stdout.split() if name.split(".")[1:2] and name.startswith(
        tuple(f"gptoss_convert.{wing}" for wing in wings))]  # fmt: skip
    assert found == []


def test_a_flipped_bit_is_named_by_values_and_by_logits(tiny: Path, tmp_path: Path) -> None:
    target = rewritten(tiny / "bf16", tmp_path / "flipped", "gpt_oss", "gpt_oss")
    weights = target / "model.safetensors"
    content = np.fromfile(weights, np.uint8)
    content[len(content) // 2 + 1] ^= 64
    content.tofile(weights)
    found = verified(tiny / "mxfp4", target)
    assert [level.same for level in found.levels] == [True, False, False]
    assert "differs; 1 of " in found.verdict
    block = found.verdict.split()[2:4]
    assert found.levels[2].findings[0].startswith(f"layer {block[0]} {block[1]} ".rstrip())

"""`check`: intact directories pass, and what is damaged is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptoss_convert.check.check import CheckReport, Reading, check
from gptoss_convert.conversion.manifest import NAME
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats import releases
from gptoss_convert.synth.synth import synth

ALL = Reading(1.0, workers=1)
TARGETS = {
    "hf": Options("hf", workers=1),
    "bf16": Options("hf", "bf16", workers=1, max_shard_size=2_000_000),
    "openai": Options("openai", workers=1),
    "megatron": Options("megatron", workers=1),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checked")
    synth(folder / "source", layers=2)
    for name, options in TARGETS.items():
        run(plan(folder / "source", folder / name, options))
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Callable[[str], Path]:
    return lambda name: Path(shutil.copytree(made / name, tmp_path / name))


def extents_of(path: Path, tensor: str) -> list[tuple[Path, int]]:
    """File and first byte of every extent of a tensor."""
    report = check(path)
    opened = report.checkpoint
    found = []
    for extent in opened.extents():
        if extent.tensor == tensor:
            found.append((extent.file.path, extent.at(extent.box)))
    assert found
    return found


def flip(file: Path, byte: int, bit: int = 0) -> None:
    with file.open("r+b") as stream:
        stream.seek(byte)
        old = stream.read(1)[0]
        stream.seek(byte)
        stream.write(bytes([old ^ 1 << bit]))


def only_problem(report: CheckReport) -> str:
    (problem,) = report.problems
    return problem


@pytest.mark.parametrize("name", ["source", *TARGETS])
def test_what_was_written_is_intact(made: Path, name: str) -> None:
    for reading in (Reading(), ALL, Reading(0.3, seed=5)):
        report = check(made / name, reading)
        assert report.problems == ()
        assert report.manifest is not None


@pytest.mark.parametrize("name", TARGETS)
def test_every_flipped_bit_names_file_and_tensor(
    made: Path, copy: Callable[[str], Path], name: str
) -> None:
    path = copy(name)
    tensors = sorted({extent.tensor for extent in check(path).checkpoint.extents()})
    for tensor in tensors[:: max(1, len(tensors) // 9)]:
        file, byte = extents_of(path, tensor)[0]
        flip(file, byte, bit=2)
        problem = only_problem(check(path, ALL))
        assert str(file) in problem
        if "mxfp4-scales" not in str(file):
            assert any(name in problem for name in (tensor, "layers.{", "block.{")), problem
        flip(file, byte, bit=2)
    assert check(path, ALL).problems == ()


def test_a_flip_that_changes_no_weight_names_its_file(copy: Callable[[str], Path]) -> None:
    path = copy("bf16")
    flip(path / "mxfp4-scales" / "scales.safetensors", -1 + 5000)
    problem = only_problem(check(path, ALL))
    assert problem.startswith(f"{path}/mxfp4-scales/scales.safetensors: changed: CRC-32 ")
    assert problem.endswith("no weight changed: header, padding or the scales' sidecar")


def test_headers_alone_find_missing_and_changed_small_files(copy: Callable[[str], Path]) -> None:
    path = copy("hf")
    (path / "tokenizer.json").unlink()
    flip(path / "chat_template.jinja", 3)
    (path / "README.md").write_text("another")
    problems = check(path).problems
    assert [problem.split(": ")[0] for problem in problems] == [
        f"{path}/README.md",
        f"{path}/chat_template.jinja",
        f"{path}/tokenizer.json",
    ]
    assert "the manifest says" in problems[0]
    assert "changed: CRC-32" in problems[1]
    assert "missing; the manifest lists it with" in problems[2]


def test_files_that_the_manifest_does_not_list_are_noted(copy: Callable[[str], Path]) -> None:
    path = copy("hf")
    (path / "notes.txt").write_text("mine")
    report = check(path)
    assert report.problems == ()
    assert "not in the manifest: notes.txt" in report.notes


def test_a_truncated_file_is_refused_at_once(copy: Callable[[str], Path]) -> None:
    path = copy("hf")
    shard = path / "model.safetensors"
    with shard.open("r+b") as stream:
        stream.truncate(shard.stat().st_size - 7)
    with pytest.raises(IntegrityError, match=r"model\.safetensors: truncated"):
        check(path)


def test_a_subset_finds_what_lies_in_it_and_is_the_same_for_a_seed(
    copy: Callable[[str], Path],
) -> None:
    path = copy("hf")
    for tensor in {extent.tensor for extent in check(path).checkpoint.extents()}:
        if not tensor.endswith("_scales"):
            flip(*extents_of(path, tensor)[0])
    first = check(path, Reading(0.1, seed=3)).problems
    assert 0 < len(first) <= 4
    assert first == check(path, Reading(0.1, seed=3)).problems
    assert len(check(path, ALL).problems) > 30


def test_without_a_manifest_values_are_looked_at(copy: Callable[[str], Path], made: Path) -> None:
    path = copy("hf")
    listed = json.loads((path / NAME).read_text())["parameters"]
    (path / NAME).unlink()
    report = check(path, ALL)
    assert report.problems == ()
    assert report.parameters == listed
    scales = "model.layers.1.mlp.experts.down_proj_scales"
    file, byte = extents_of(path, scales)[0]
    with file.open("r+b") as stream:
        stream.seek(byte)
        stream.write(b"\xff")
    assert f"{scales}: " in only_problem(check(path, ALL))
    file, byte = extents_of(path, "model.norm.weight")[0]
    with file.open("r+b") as stream:
        stream.seek(byte)
        stream.write(b"\xc0\x7f" + b"\x80\xff")
    assert "model.norm.weight: NaN at [0] (hidden)" in check(path, ALL).problems[1]


def test_another_schema_of_the_manifest_is_refused(copy: Callable[[str], Path]) -> None:
    path = copy("openai")
    content = json.loads((path / NAME).read_text())
    (path / NAME).write_text(json.dumps({**content, "schema": 99}))
    with pytest.raises(InputError, match=r"gptoss-convert\.json: schema 99, this version reads 1"):
        check(path)


def test_a_release_is_told_from_a_directory_of_the_same_sizes(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import hashlib

    file = made / "hf" / "model.safetensors"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    fake = releases.Release("some/release", {file.name: (file.stat().st_size, digest)})
    monkeypatch.setattr(releases, "_RELEASES", (fake,))
    assert check(made / "hf").release == (
        "some/release by file sizes; --read-data compares SHA-256"
    )
    assert check(made / "hf", ALL).release == (
        "some/release as released: every SHA-256 is the published one"
    )
    other = releases.Release("some/release", {file.name: (file.stat().st_size, "0" * 64)})
    monkeypatch.setattr(releases, "_RELEASES", (other,))
    report = check(made / "hf", ALL)
    assert report.release is None
    assert "the sizes of some/release, other bytes: model.safetensors" in report.notes


def test_the_published_sizes_are_known() -> None:
    sizes = [
        {
            "model-00000-of-00002.safetensors": 4792272488,
            "model-00001-of-00002.safetensors": 4798702184,
            "model-00002-of-00002.safetensors": 4170342232,
        },
        {"model.safetensors": 13761300984},
    ]
    found = [releases.of_sizes(known) for known in sizes]
    assert [release and release.name for release in found] == [
        "openai/gpt-oss-20b",
        "openai/gpt-oss-20b original/",
    ]
    assert releases.of_sizes({"model.safetensors": 1}) is None

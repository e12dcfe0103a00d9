"""What travels beside the weights: what a server reads, looked at; all else is left and named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoss_convert.check.check import check
from gptoss_convert.containers import Image
from gptoss_convert.conversion.acceptable import require_acceptable
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import InputError, IntegrityError
from tests import odd_models

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0614\nsize 27868174\n"
SERVED = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "#version: 0.2\n",
    "tokenizer.model": "\x00model",
    "o200k_base.tiktoken": "IQ== 0\n",
    "generation_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "README.md": "# A model\n",
    "LICENSE": "Apache-2.0\n",
    "USAGE_POLICY": "none\n",
}
OF_A_RUN = {
    "optimizer.pt": "pickle",
    "optimizer.bin": "pickle",
    "scheduler.pt": "pickle",
    "rng_state_0.pth": "pickle",
    "training_args.bin": "pickle",
    "pytorch_model_fsdp.bin": "pickle",
    "trainer_state.json": "{}",
    "trainer_log.jsonl": "{}\n",
    "events.out.tfevents.1.host.1.0": "log",
    "train.log": "log",
    "optimizer.pkl": "pickle",
    "README.pkl": "pickle",
    "adapter.py": "code",
    "hf_quant_config.json": "{}",
    "all_results.json": "{}",
    "latest": "global_step10",
    "zero_to_fp32.py": "code",
}


def source_with(tmp_path: Path, **files: str) -> Path:
    source = odd_models.save(tmp_path / "source")
    for path in source.glob("generation_config.json"):
        path.unlink()
    for name, text in files.items():
        (source / name).write_text(text)
    return source


@pytest.mark.parametrize("to", ["hf", "megatron"])
def test_what_a_server_reads_is_carried_and_the_rest_is_left_and_named(tmp_path: Path, to: str):
    source = source_with(tmp_path, **SERVED, **OF_A_RUN)
    (source / "checkpoint-10").mkdir()
    (source / ".cache").mkdir()
    conversion = plan(source, tmp_path / "target", Options(to, workers=1))
    run(conversion)
    place = tmp_path / "target" / ("hf" if to == "megatron" else "")
    for name, text in SERVED.items():
        assert (place / name).read_text() == text
    for name in (*OF_A_RUN, "checkpoint-10", ".cache"):
        assert not (place / name).exists()
    left = [note for note in conversion.notes if note.startswith("left behind")]
    names = sorted([*OF_A_RUN, "checkpoint-10/"])
    assert left == [
        f"left behind, as no server reads it: {', '.join(names[:8])} and {len(names) - 8} more"
    ]


def test_a_directory_of_a_served_model_gives_no_note(tmp_path: Path):
    source = source_with(tmp_path, **SERVED)
    (source / "original").mkdir()
    assert plan(source, tmp_path / "target", Options("hf")).notes == ()


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("tokenizer.json", POINTER, "a Git LFS pointer; fetch the file: git lfs pull"),
        ("chat_template.jinja", POINTER, "a Git LFS pointer; fetch the file: git lfs pull"),
        ("README.md", POINTER, "a Git LFS pointer; fetch the file: git lfs pull"),
        (
            "tokenizer.json",
            "<!DOCTYPE html>",
            "looks like an HTML page; download it again",
        ),
        (
            "tokenizer_config.json",
            '{"a": {',
            "no JSON object in 7 bytes: truncated, or another kind of file",
        ),
        ("generation_config.json", '{"a" 1}', "not JSON: Expecting ':' delimiter: *"),
        (
            "special_tokens_map.json",
            "",
            "empty file",
        ),
        (
            "tokenizer.json",
            '{"a": "' + "x" * (1 << 20),
            "no JSON object in 1048583 bytes: truncated, or another kind of file",
        ),
        ("merges.txt", "", "empty file"),
        ("chat_template.jinja", "\x00\x01", "not text"),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_refused(
    tmp_path: Path, name: str, text: str, problem: str
):
    source = source_with(tmp_path, **{**SERVED, name: text})
    with pytest.raises(IntegrityError) as refused:
        plan(source, tmp_path / "target", Options("hf"))
    ending = "; or pass --tokenizer DIR to take such files from there"
    expected = f"{source / name}: {problem}{ending}"
    assert str(refused.value).startswith(expected.partition("*")[0])
    assert str(refused.value).endswith(ending)
    good = tmp_path / "good"
    good.mkdir()
    for other, content in SERVED.items():
        (good / other).write_text(content)
    plan(source, tmp_path / "target", Options("hf", tokenizer=good))


def test_a_config_that_is_a_pointer_is_named(tmp_path: Path):
    source = source_with(tmp_path)
    (source / "config.json").write_text(POINTER)
    with pytest.raises(IntegrityError, match=r"config.json: a Git LFS pointer; fetch the file"):
        plan(source, tmp_path / "target", Options("hf"))


def test_generation_config_travels_byte_for_byte(tmp_path: Path):
    text = json.dumps({"eos_token_id": [2], "do_sample": True}, indent=4)
    source = source_with(tmp_path, **{"generation_config.json": text})
    run(plan(source, tmp_path / "target", Options("hf", workers=1)))
    assert (tmp_path / "target/generation_config.json").read_text() == text


@pytest.mark.parametrize("name", ["README\n.md", "NOTICE: all.txt", "LICENSE*", "LICENCE\\x.txt"])
def test_a_name_that_no_check_accepts_is_refused_before_the_first_byte(
    tmp_path: Path, name: str
) -> None:
    source = source_with(tmp_path, **{name: "text"})
    with pytest.raises(InputError, match=r"no name for a file on every system"):
        plan(source, tmp_path / "target", Options("hf", workers=1))


def test_numbers_beyond_all_bounds_are_refused(tmp_path: Path) -> None:
    source = source_with(tmp_path)
    text = (source / "config.json").read_text()
    (source / "config.json").write_text(text.replace("{", '{"mine": 1e999,', 1))
    with pytest.raises(IntegrityError, match=r"config\.json: not JSON: 1e999 is no finite number"):
        plan(source, tmp_path / "target", Options("hf", workers=1))


def test_files_that_would_be_one_another_s_folder_are_refused() -> None:
    def image(*names: str) -> Image:
        return Image((), (), tuple((name, b"{}") for name in names))

    require_acceptable(image("a/b", "a/c", "config.json"))
    for names, problem in (
        (("mxfp4-scales", "mxfp4-scales/origin.json"), "mxfp4-scales would be a file and a folder"),
        (("README.md", "README.md"), r"README\.md would be two files"),
        (("gptoss-convert.json",), r"gptoss-convert\.json would be two files"),
        (("../x",), "no name for a file"),
    ):
        with pytest.raises(InputError, match=problem):
            require_acceptable(image(*names))
    with pytest.raises(InputError, match=r"config\.json: \d+ bytes, at most"):
        require_acceptable(Image((), (), (("hf/config.json", b" " * (5 << 20) + b"{}"),)))


def test_check_looks_at_carried_files(tmp_path: Path) -> None:
    source = source_with(tmp_path, **SERVED)
    assert not check(source).problems
    (source / "tokenizer.json").write_text(POINTER)
    (source / "added_tokens.json").write_text('{"a":')
    assert [problem.partition(":")[0] for problem in check(source).problems] == [
        str(source / "added_tokens.json"),
        str(source / "tokenizer.json"),
    ]

"""Prompts of one's own: encoded by the checkpoint's tokenizer, and what both sides expect next."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from gptoss_convert.containers.budget import Budget
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.prompts import own_sequences, shown_tokens
from gptoss_convert.verify.result import VerifyOptions
from gptoss_convert.witness.parity_report import NextTokens


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "tiny"
    synth(path)
    return path


@pytest.fixture(scope="module")
def opened(tiny: Path) -> Checkpoint:
    return open_checkpoint(tiny)


def test_a_text_is_encoded_by_the_tokenizer_beside_the_checkpoint(
    tiny: Path, opened: Checkpoint
) -> None:
    tokenizer = Tokenizer.from_file(str(tiny / "tokenizer.json"))
    text = "<|start|>user<|message|>Grüße, 東京"
    (one,) = own_sequences(None, text, (opened,), 288)
    assert one.shown
    assert tokenizer.decode(one.tokens, skip_special_tokens=False) == text
    assert one.tokens[0] == tokenizer.token_to_id("<|start|>")


def test_without_a_tokenizer_a_text_is_refused(tiny: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).hardlink_to(tiny / name)
    with pytest.raises(UsageError, match=r"text needs a tokenizer\.json beside SOURCE or TARGET"):
        own_sequences(None, "hello", (open_checkpoint(tmp_path),), 288)


def test_both_sides_stand_beside_each_other_by_rank(opened: Checkpoint) -> None:
    found = NextTokens("prompt", ((104, 0.75), (105, 0.25)), ((105, 0.5), (33, 0.125)))
    first, second = shown_tokens([found], opened)
    assert first.split() == ["0.7500", "'h'", "0.5000", "'i'"]
    assert second.split() == ["0.2500", "'i'", "0.1250", "'!'"]


def test_models_that_differ_expect_different_tokens(tiny: Path, tmp_path: Path) -> None:
    synth(tmp_path / "other", seed=1)
    options = VerifyOptions(device="cpu", prompt="hello", max_length=1, sample=1)
    found = verify_checkpoints(tiny, tmp_path / "other", options)
    (shown,) = found.levels[-1].numbers["next_tokens"]
    for side in ("source", "target"):
        chances = [chance for _, chance in shown[side]]
        assert chances == sorted(chances, reverse=True)
        assert len(chances) == 5
    assert shown["source"] != shown["target"]
    lines = found.levels[-1].numbers["next_tokens_text"]
    assert f"{shown['source'][0][1]:7.4f}" in lines[0]
    assert f"{shown['target'][0][1]:7.4f}" in lines[0]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[" * 100_000, "expects a list of token ids or a string"),
        (b"[" + b"9" * 5000 + b"]", "expects a list of token ids or a string"),
        (b"[1]\n" * 200, "or more values, at most 100 are read"),
        (b" " * 2001, "more than 2000 bytes"),
    ],
)
def test_a_file_of_prompts_has_a_budget(
    content: bytes, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "values" in told or "bytes" in told:
        monkeypatch.setattr("gptoss_convert.verify.prompts.PROMPTS", Budget(2000, 100))
    (tmp_path / "prompts.jsonl").write_bytes(content)
    with pytest.raises(InputError, match=told):
        own_sequences(tmp_path / "prompts.jsonl", None, (), 100)


@pytest.mark.parametrize(
    ("content", "error", "told"),
    [
        (b"", InputError, "no line holds a prompt"),
        (b" \n\n", InputError, "no line holds a prompt"),
        (b"\xff", InputError, "no text: not UTF-8 at byte 0"),
        (None, UsageError, "no such file"),
    ],
)
def test_a_file_without_prompts_is_named(
    content: bytes | None, error: type[Exception], told: str, tmp_path: Path
) -> None:
    path = tmp_path / "prompts.jsonl"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(error, match=told):
        own_sequences(path, None, (), 100)
    with pytest.raises(UsageError, match="is a directory"):
        own_sequences(tmp_path, None, (), 100)

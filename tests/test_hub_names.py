"""What is a repository and what a directory: never guessed."""

from __future__ import annotations

from pathlib import Path

import pytest

from gptoss_convert.errors import UsageError
from gptoss_convert.formats.repository import Repository
from gptoss_convert.hub.names import repository, similar


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)


def test_names_of_repositories_and_their_revisions():
    assert repository("openai/gpt-oss-20b") == Repository("openai/gpt-oss-20b")
    assert repository("openai/gpt-oss-20b", "v1") == Repository("openai/gpt-oss-20b", "v1")
    assert repository("hf://a/b@refs/pr/4") == Repository("a/b", "refs/pr/4")
    assert repository("hf://models/mine") == Repository("models/mine")


def test_an_existing_path_wins_and_a_path_is_a_path():
    assert repository("models/mine") is None
    assert repository(Path("openai/gpt-oss-20b")) is None
    for path in ("nowhere", "./openai/x", "/openai/x", "a/b/c", "../x", "a/b/"):
        assert repository(path) is None


@pytest.mark.parametrize(
    ("source", "revision", "message"),
    [
        ("models/other", None, "no such directory in models; for the repository write hf://models"),
        ("gpt-oss-20b", None, "no such directory; did you mean openai/gpt-oss-20b, on the Hub?"),
        ("GPT-OSS-120b", None, "did you mean openai/gpt-oss-120b"),
        ("models/mine", "v1", "--revision v1: models/mine is not a repository"),
        ("hf://mine", None, "expects hf://owner/name"),
        ("hf://a/b@v1", "v2", "expects hf://owner/name"),
        ("hf://a/..", None, "expects hf://owner/name"),
    ],
)
def test_what_could_be_mixed_up_is_asked_for(source: str, revision: str | None, message: str):
    with pytest.raises(UsageError) as caught:
        repository(source, revision)
    assert message in str(caught.value)


def test_slips_in_released_names_are_noticed():
    assert similar("openai/gpt_oss_20b") == "; did you mean openai/gpt-oss-20b?"
    assert similar("openai/gpt-oss20b") == "; did you mean openai/gpt-oss-20b?"
    assert similar("openai/gpt-oss-20b") == similar("meta/llama") == ""

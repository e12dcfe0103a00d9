"""What our pages tell Megatron-LM: its own parser and checks take it, and make the same model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.cli.main import cli
from gptoss_convert.formats.megatron import fields
from gptoss_convert.formats.megatron.launch import launch_page
from gptoss_convert.formats.megatron.stated import of_args
from tests.megatron_arguments import (
    CONFIGS,
    RANKS,
    cases,
    page_words,
    parser,
    recipe_words,
    recorded,
)

ROOT = Path(__file__).parent.parent
WITH_YARN = ("core_v0.19.0", "main")
"""Versions that the pages are for; before, GPTModel gets YaRN from no argument."""
PAGES = [(version, name) for version in WITH_YARN for name in CONFIGS]


def outcome(version: str, name: str) -> dict[str, Any]:
    found = recorded()["versions"][version]["outcomes"][name]
    assert isinstance(found, dict)
    return found


def test_what_the_pages_say_is_what_was_recorded() -> None:
    """Otherwise what follows proves nothing: run tools/record_megatron_arguments.py again."""
    assert {name: case.plain() for name, case in cases().items()} == recorded()["cases"]


@pytest.mark.parametrize(("version", "name"), PAGES)
def test_megatron_lm_accepts_a_page_and_makes_its_model_of_it(version: str, name: str) -> None:
    found = outcome(version, name)
    assert "refused" not in found
    config, args = CONFIGS[name], found["fields"]
    numbers = fields.take(of_args(version, args))
    assert numbers == {number: getattr(config, number) for number in numbers}
    assert args["padded_vocab_size"] == config.vocab_size
    assert args["max_position_embeddings"] == config.max_position_embeddings
    assert (args["world_size"], args["expert_model_parallel_size"]) == (RANKS, RANKS)


@pytest.mark.parametrize(("version", "name"), PAGES)
def test_the_recorded_parser_parses_as_megatron_lm_did(version: str, name: str) -> None:
    words = [*page_words(CONFIGS[name]), *recipe_words()]
    args = outcome(version, name)["fields"]
    given = vars(parser(version).parse_args(words))
    asked = {word for word in words if word.startswith("--")}
    options = [
        option
        for option in recorded()["versions"][version]["options"]
        if asked & {*option["names"]}
    ]
    assert len(options) == len(asked)
    for option in options:
        # Types of Megatron-LM's own are not rebuilt.
        if option.get("type") in (None, "int", "float", "str"):
            found = args[option["dest"]]
            # validate_args has made one word of a list of one.
            assert given[option["dest"]] in (found, [found]), option["dest"]


@pytest.mark.parametrize("version", WITH_YARN)
def test_megatron_lm_refuses_args_without_position_embedding(version: str) -> None:
    refused = outcome(version, "no position embedding")["refused"]
    assert refused == (
        "RuntimeError: --no-position-embedding is deprecated, use --position-embedding-type"
    )


def test_megatron_lm_before_yarn_had_arguments_refuses_the_page() -> None:
    with pytest.raises(ValueError, match="position-embedding-type: invalid choice: 'yarn'"):
        parser("core_v0.16.1").parse_args(page_words(CONFIGS["20b"]))
    assert "invalid choice: 'yarn'" in outcome("core_v0.16.1", "20b")["refused"]


@pytest.mark.parametrize("version", WITH_YARN)
def test_a_renamed_argument_is_unknown(version: str) -> None:
    for place, word in enumerate(words := page_words(CONFIGS["20b"])):
        if word.startswith("--"):
            renamed = [*words[:place], f"{word}-s", *words[place + 1 :]]
            with pytest.raises(ValueError, match=r"unrecognized|expected|required"):
                parser(version).parse_args(renamed)


def documents() -> dict[str, str]:
    recipes = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    ours = recipes.partition("\n## Fine-tune with Megatron-LM")[2].partition("\n## ")[0]
    return {
        "docs/megatron.md": (ROOT / "docs" / "megatron.md").read_text(encoding="utf-8"),
        "docs/recipes.md": ours,
        "megatron-launch.md": launch_page(CONFIGS["20b"], "modern"),
    }


@pytest.mark.parametrize("page", documents())
@pytest.mark.parametrize("version", WITH_YARN)
def test_every_option_that_a_page_names_is_one(version: str, page: str) -> None:
    found = recorded()["versions"][version]
    theirs = {name for option in found["options"] for name in option["names"]}
    others = {"--nproc-per-node", *found["modelopt"]}
    named = {*re.findall(r"(?<![\w-])--[a-z][a-z0-9-]+", documents()[page])}
    assert named & theirs
    own = {name for command in cli.commands.values() for p in command.params for name in p.opts}
    assert named - theirs - others - own == set()

from __future__ import annotations

import hashlib
import json
import unicodedata
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptoss_convert.witness.configs import read_json
from gptoss_convert.witness.hf_config import hf_config
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.tokens import (
    CATEGORIES,
    WRITTEN,
    digest,
    extra_set,
    sequence,
    standard_lengths,
    token_set,
)
from tests.tiny_files import write_hf_bf16
from tests.tiny_models import SQUARE, random_weights

TEXTS = Path(__file__).parents[1] / "gptoss_convert" / "witness" / "texts"
SPECIAL = {
    "<|endoftext|>": 199999, "<|return|>": 200002, "<|constrain|>": 200003, "<|channel|>": 200005,
    "<|start|>": 200006, "<|end|>": 200007, "<|message|>": 200008, "<|call|>": 200012,
}  # fmt: skip
"""Special tokens of GPT-OSS's tokenizer, o200k_harmony."""
SCRIPTS = {
    "LATIN", "CYRILLIC", "GREEK", "ARABIC", "HEBREW", "DEVANAGARI", "BENGALI", "TAMIL", "TELUGU",
    "THAI", "ETHIOPIC", "GEORGIAN", "ARMENIAN", "CJK", "HIRAGANA", "KATAKANA", "HANGUL",
}  # fmt: skip
RELEASED = (1, 2, 127, 128, 129, 130, 256, 1024, 4095, 4096, 4097, 8192, 32768, 131072)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    directory = tmp_path_factory.mktemp("tokens") / "hf"
    write_hf_bf16(directory, SQUARE, random_weights(SQUARE))
    return hf_config(read_json(directory / "config.json"))


@pytest.fixture(scope="module")
def released(tiny: ModelConfig) -> ModelConfig:
    """What the token set depends on, as in the released models."""
    return replace(tiny, window=128, rope_original_length=4096, vocab=201088)


def test_the_lengths_for_the_released_models(released: ModelConfig) -> None:
    assert standard_lengths(released) == RELEASED


def test_the_token_set_for_the_released_models_never_changes(released: ModelConfig) -> None:
    sequences = token_set(released, longest=8192, positions=65536)
    assert sum(len(one.tokens) for one in sequences) == 66831
    assert digest(sequences) == "c3d397880eb766b3f28dc8c218421c9650fafb1da08fc5fd1a52ff4aeb514160"


def test_prompts_beyond_window_and_original_length_are_never_optional(
    tiny: ModelConfig, released: ModelConfig
) -> None:
    for config in (tiny, released):
        lengths = [len(one.tokens) for one in token_set(config, longest=1, positions=1)]
        assert max(lengths) == config.rope_original_length + 1
        assert len(lengths) == 2


@pytest.mark.parametrize("category", CATEGORIES)
def test_every_category_stays_in_the_vocabulary(category: str) -> None:
    for vocab in (50, 256, 201088):
        tokens = sequence(category, 5000, 0, vocab).tokens
        assert len(tokens) == 5000
        assert 0 <= min(tokens) <= max(tokens) < vocab
        assert len(set(tokens)) > min(vocab, 97) // 2


def test_generated_categories_have_the_structure_they_are_named_for() -> None:
    periodic = sequence("periodic", 300, 0, 201088).tokens
    assert periodic[:200] == periodic[97:297]
    runs = torch.tensor(sequence("runs", 8192, 0, 201088).tokens)
    assert (runs[1:] == runs[:-1]).double().mean() > 0.9


@pytest.mark.parametrize("category", WRITTEN)
def test_the_ids_are_those_of_the_texts(category: str) -> None:
    content = (TEXTS / f"{category}.txt").read_bytes()
    entry = json.loads((TEXTS / "ids.json").read_bytes())[category]
    assert entry["sha256"] == hashlib.sha256(content).hexdigest(), "run tools/encode_texts.py"
    passages = content.decode().removesuffix("<|endoftext|>\n").split("<|endoftext|>\n")
    assert len(passages) == len(entry["passages"])
    for text, ids in zip(passages, entry["passages"], strict=True):
        assert ids[-1] == SPECIAL["<|endoftext|>"]
        for token, number in SPECIAL.items():
            assert ids[:-1].count(number) == text.count(token)
        ordinary = [one for one in ids if one not in SPECIAL.values()]
        assert max(ordinary) < 199998
        for token in SPECIAL:
            text = text.replace(token, "")
        assert len(text) / 6 < len(ordinary) < len(text.encode())


def test_the_texts_are_written_in_many_scripts_and_use_every_special_token() -> None:
    text = (TEXTS / "text.txt").read_text(encoding="utf-8")
    names = {unicodedata.name(one, "").partition(" ")[0] for one in text}
    assert names >= SCRIPTS
    assert "\N{ROCKET}" in text
    chat = (TEXTS / "chat.txt").read_text(encoding="utf-8")
    assert all(token in chat for token in SPECIAL)


def test_a_written_sequence_begins_with_a_passage_and_repeats_all_of_them() -> None:
    passages = json.loads((TEXTS / "ids.json").read_bytes())["chat"]["passages"]
    period = sum(map(len, passages))
    tokens = list(sequence("chat", 4097, 0, 201088).tokens)
    assert any(tokens[: len(one)] == one for one in passages)
    assert tokens[period:] == tokens[:-period]
    assert sorted(tokens[:period]) == sorted(token for one in passages for token in one)
    folded = sequence("chat", 4097, 0, 256).tokens
    assert folded == tuple(token % 256 for token in tokens)


def test_rounds_and_extra_sets_differ(tiny: ModelConfig) -> None:
    sequences = [*token_set(tiny, 256, 3000), *extra_set(tiny, 0), *extra_set(tiny, 1)]
    long = [one for one in sequences if len(one.tokens) > 4]
    assert len({one.tokens for one in long}) == len({one.name for one in long}) == len(long)

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptoss_convert.verify.configs import hf_config, read_json
from gptoss_convert.verify.model import ModelConfig
from gptoss_convert.verify.tokens import (
    CATEGORIES,
    digest,
    extra_set,
    sequence,
    standard_lengths,
    token_set,
)
from tests.tiny_files import write_hf_bf16
from tests.tiny_models import SQUARE, random_weights

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
    assert digest(sequences) == "fc606e2f1ceeb8da58f0d83ec9b2476a1d475db65bffffff3e7b1be46e40499d"


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


def test_categories_have_the_structure_they_are_named_for() -> None:
    frequent = torch.tensor(sequence("frequent", 8192, 0, 201088).tokens)
    assert (frequent < 2011).double().mean() > 0.3
    periodic = sequence("periodic", 300, 0, 201088).tokens
    assert periodic[:200] == periodic[97:297]
    runs = torch.tensor(sequence("runs", 8192, 0, 201088).tokens)
    assert (runs[1:] == runs[:-1]).double().mean() > 0.9
    chat = torch.tensor(sequence("chat", 8192, 0, 201088).tokens)
    assert 0.03 < (chat >= 201088 - 1048).double().mean() < 0.1


def test_rounds_and_extra_sets_differ(tiny: ModelConfig) -> None:
    sequences = [*token_set(tiny, 256, 3000), *extra_set(tiny, 0), *extra_set(tiny, 1)]
    long = [one for one in sequences if len(one.tokens) > 4]
    assert len({one.tokens for one in long}) == len({one.name for one in long}) == len(long)

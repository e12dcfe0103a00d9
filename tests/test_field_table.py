"""The table of Megatron's fields: complete for what is installed and for what was recorded."""

from __future__ import annotations

import inspect
from collections import Counter
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from gptoss_convert.formats.config import Config
from gptoss_convert.formats.megatron.field_table import EXTRA, FIXED, HARMLESS, NUMBERS
from gptoss_convert.formats.megatron.fields import model_fields, model_numbers
from gptoss_convert.formats.megatron.stated import of_args, of_provider
from tests.recorded import unpack

READ = {field.name for field in (*NUMBERS, *FIXED)} | EXTRA
SPELT = {name for field in (*NUMBERS, *FIXED) for name in (field.name, *field.args)} | EXTRA


@pytest.mark.filterwarnings("ignore")
def test_every_field_of_the_installed_megatron_core_stands_in_the_table() -> None:
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.transformer.heterogeneous.heterogeneous_config import (
        HeterogeneousTransformerConfig,
    )
    from megatron.core.transformer.transformer_config import (
        MLATransformerConfig,
        TransformerConfig,
    )

    classes = (
        *(ModelParallelConfig, TransformerConfig, MLATransformerConfig),
        HeterogeneousTransformerConfig,
    )
    names = {field.name for kind in classes for field in fields(kind)}
    assert len(names) > 200
    assert sorted(names - READ - HARMLESS) == []


@pytest.mark.filterwarnings("ignore")
def test_every_parameter_of_the_installed_gpt_model_stands_in_the_table() -> None:
    from megatron.core.models.gpt import GPTModel

    # What is no number of a field: the configuration itself, sizes, and how the model is cut.
    others = {"self", "config", "max_sequence_length", "pre_process", "post_process", "vp_stage"}
    others |= {"pg_collection", "mtp_block_spec"}
    names = set(inspect.signature(GPTModel.__init__).parameters) - others
    assert sorted(names - READ - HARMLESS) == []


def test_every_field_that_bridge_recorded_stands_in_the_table(tmp_path: Path) -> None:
    saves = unpack("megatron-saves.tar.xz", tmp_path)
    found = sorted(saves.glob("bridge-*/iter_*/run_config.yaml"))
    assert len(found) == 4
    for path in found:
        model = yaml.safe_load(path.read_text())["model"]
        assert sorted(model.keys() - {"_target_"} - READ - HARMLESS) == [], path


def test_every_field_stands_once() -> None:
    names = [name for field in (*NUMBERS, *FIXED) for name in (field.name, *field.args)]
    assert [name for name, count in Counter(names).items() if count > 1] == []
    assert not HARMLESS & SPELT


NOT_READ = {"vocab_size", "max_position_embeddings", "attention_factor"}
"""Rows may be padded, no field that is read tells the context, and YaRN's factor is its own."""


def test_every_number_of_the_model_is_read_once_and_written() -> None:
    read = [field.number for field in NUMBERS]
    numbers = {field.name for field in fields(Config) if field.name != "notes"}
    assert sorted(map(str, read)) == sorted(numbers - NOT_READ)
    given: list[Any] = [4, 8, 2, *[4] * 9, *map(float, range(2, 8))]
    config = Config(*given)
    assert {field.name for field in NUMBERS} == model_numbers(config).keys()
    assert model_fields(config).keys() <= READ


def test_a_field_that_only_another_attention_reads_says_nothing() -> None:
    """rotary_scaling_factor is multi-latent attention's; in arguments since core 0.19, YaRN's."""
    provider = of_provider("p", {"rotary_scaling_factor": None, "mscale": 0.5})
    assert provider.fields["yarn_rotary_scaling_factor"] == 32.0
    assert "rotary_scaling_factor" not in provider.fields
    older = of_args("a", {"rotary_scaling_factor": 40, "mscale": 0.7})
    assert older.fields == {}
    newer = of_args("a", {"rotary_scaling_factor": 40, "yarn_beta_fast": None})
    assert newer.fields == {"yarn_rotary_scaling_factor": 40, "yarn_beta_fast": 32.0}


def test_the_modelopt_builder_sets_yarn_against_the_arguments() -> None:
    args = {"enable_gpt_oss": True, "position_embedding_type": "rope", "rotary_scaling_factor": 1}
    fields = of_args("a", args).fields
    assert fields["position_embedding_type"] == "yarn"
    assert fields["yarn_original_max_position_embeddings"] == 131072

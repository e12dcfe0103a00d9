from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.limits import load_limits
from gptoss_convert.witness.openai import OpenAiReader
from gptoss_convert.witness.parity import compare
from gptoss_convert.witness.tokens import TokenSequence, sequence, token_set
from gptoss_convert.witness.walk import Prompts, all_logits
from tests.mutants import Mutant, MutantReader, mapped, with_numbers
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4, write_openai
from tests.tiny_models import DISTINCT, SQUARE, random_weights

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> tuple[HfReader, OpenAiReader]:
    folder, weights = tmp_path_factory.mktemp("parity"), random_weights(SQUARE, seed=8)
    packed = HfReader(write_hf_mxfp4(folder / "mxfp4", SQUARE, weights), CPU)
    return packed, OpenAiReader(write_openai(folder / "original", SQUARE, weights), CPU)


def test_the_same_model_passes_without_a_single_bit_of_difference(
    readers: tuple[HfReader, OpenAiReader],
) -> None:
    sequences = token_set(readers[0].config, longest=129, positions=0)
    report = compare(
        *readers, sequences, load_limits("lossless"), CPU, positions_at_once=100, both=True
    )
    assert report.passed
    assert report.config_differences == ()
    assert report.first_over is None
    assert report.overall.positions == sum(len(one.tokens) for one in sequences)
    assert list(report.buckets) == ["<16", "16-127", ">=128"]
    assert sum(b.positions for b in report.buckets.values()) == report.overall.positions
    assert all(layer.cold_experts == () for layer in report.layers)
    assert json.loads(json.dumps(asdict(report)))["dtype"] == "float32"


def test_every_position_counts_once_by_position_and_by_expert(
    readers: tuple[HfReader, OpenAiReader],
) -> None:
    source, target = readers
    wrong = MutantReader(target, Mutant("x", mapped("router_bias", lambda b: b + b)), target)
    sequences = token_set(source.config, longest=129, positions=0)
    report = compare(source, wrong, sequences, load_limits("lossless"), CPU)
    positions = report.overall.positions
    assert sum(one.length for one in report.sequences) == positions
    ranges = report.kl_by_position
    assert sum(one.positions for one in ranges) == positions
    assert {report.window, report.original_length} <= {one.start for one in ranges}
    assert (ranges[0].start, ranges[-1].end) == (0, 129)
    assert max(one.kl_max for one in ranges) == report.overall.kl_max
    chosen = positions * source.config.experts_per_token
    for layer in report.layers:
        assert sum(layer.source_hits) == sum(layer.target_hits) == chosen
    assert report.layers[0].source_hits == report.layers[0].target_hits
    assert report.layers[1].source_hits != report.layers[1].target_hits
    for error in (error for layer in report.layers for error in layer.errors):
        assert (error.mean == 0) == (error.error == 0)
        assert error.mean <= error.error
    assert report.layers[0].errors[2].source_rms == report.layers[0].errors[2].target_rms
    assert report.layers[2].errors[2].source_rms != report.layers[2].errors[2].target_rms


def test_rounds_are_added_until_every_expert_was_chosen(
    readers: tuple[HfReader, OpenAiReader],
) -> None:
    one_token = (TokenSequence("one", (3,)),)
    limits = load_limits("lossless")
    report = compare(*readers, one_token, limits, CPU)
    assert report.overall.positions > 1
    assert all(layer.cold_experts == () for layer in report.layers)
    report = compare(*readers, one_token, limits, CPU, extra_rounds=0)
    assert report.overall.positions == 1
    assert all(len(layer.cold_experts) == 4 for layer in report.layers)


def test_the_report_names_the_first_sub_block_and_what_feeds_it(
    readers: tuple[HfReader, OpenAiReader],
) -> None:
    source, target = readers
    wrong = MutantReader(target, Mutant("x", mapped("router_bias", lambda b: b + b)), target)
    tokens = (sequence("uniform", 20, 0, SQUARE.vocab), sequence("chat", 30, 0, SQUARE.vocab))
    report = compare(source, wrong, tokens, load_limits("float32"), CPU, extra_rounds=0)
    assert report.first_over is not None
    assert (report.first_over.layer, report.first_over.block) == (1, "router")
    assert report.source_feeding == (
        "model.layers.1.post_attention_layernorm.weight",
        "model.layers.1.mlp.router.weight",
        "model.layers.1.mlp.router.bias",
    )
    assert report.target_feeding[2] == "block.1.mlp.gate.bias"
    assert report.layers[0].routing_agreement == 1
    assert report.layers[1].routing_agreement < 1
    assert {report.worst_kl.sequence, report.first_over.sequence} <= {one.name for one in tokens}
    assert any("routing agreement of layer" in line for line in report.violations)


def test_numbers_that_differ_are_listed(readers: tuple[HfReader, OpenAiReader]) -> None:
    source, target = readers
    wrong = MutantReader(target, Mutant("x", config=with_numbers(window=17)), target)
    tokens = (sequence("uniform", 20, 0, SQUARE.vocab),)
    report = compare(source, wrong, tokens, load_limits("lossless"), CPU, extra_rounds=0)
    assert report.config_differences == ("window: source 16, target 17",)
    assert not report.passed
    assert report.layers[0].errors[0].position >= 16


def test_models_of_different_sizes_are_refused(
    tmp_path: Path, readers: tuple[HfReader, OpenAiReader]
) -> None:
    source = readers[0]
    other = HfReader(write_hf_bf16(tmp_path / "hf", DISTINCT, random_weights(DISTINCT)), CPU)
    with pytest.raises(InputError, match="hidden expects 128 as in the source, found 224"):
        compare(source, other, (), load_limits("lossless"), CPU)
    shorter = Mutant("x", config=lambda c: replace(c, sliding=c.sliding[:2]))
    with pytest.raises(InputError, match="layers expects 4 as in the source, found 2"):
        wrong = MutantReader(source, shorter, source)
        compare(source, wrong, (), load_limits("lossless"), CPU)


def test_unknown_limits_list_the_choices() -> None:
    with pytest.raises(
        UsageError, match="expects one of lossless, float32, bfloat16, lossy, found 'loose'"
    ):
        load_limits("loose")


def test_the_last_token_of_a_sequence_predicts_nothing(
    readers: tuple[HfReader, OpenAiReader],
) -> None:
    source, target = readers
    tokens = (sequence("uniform", 20, 0, SQUARE.vocab), sequence("chat", 30, 0, SQUARE.vocab))
    report = compare(source, target, tokens, load_limits("lossless"), CPU, extra_rounds=0)
    nll = []
    for one in tokens:
        logits = all_logits(source, Prompts.of([one.tokens], CPU), Numerics())
        shares = logits.double().log_softmax(1)
        nll += [-shares[n, token] for n, token in enumerate(one.tokens[1:])]
    assert abs(report.overall.source_nll - float(sum(nll)) / 48) < 1e-5

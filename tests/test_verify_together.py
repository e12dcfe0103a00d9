"""What is equal on both sides is computed once, and the report says the same as if it were not."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.limits import load_limits
from gptoss_convert.witness.openai import OpenAiReader
from gptoss_convert.witness.parity import compare
from gptoss_convert.witness.parity_report import ParityReport
from gptoss_convert.witness.readers import Reader
from gptoss_convert.witness.together import same_layer, same_values
from gptoss_convert.witness.tokens import sequence, token_set
from tests.mutants import Mutant, MutantReader, mapped, with_numbers, zeroed_expert
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4, write_openai
from tests.tiny_models import SQUARE, random_weights

CPU = torch.device("cpu")
Readers = tuple[HfReader, OpenAiReader, HfReader]


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Readers:
    folder, weights = tmp_path_factory.mktemp("together"), random_weights(SQUARE, seed=8)
    return (
        HfReader(write_hf_mxfp4(folder / "mxfp4", SQUARE, weights), CPU),
        OpenAiReader(write_openai(folder / "original", SQUARE, weights), CPU),
        HfReader(write_hf_bf16(folder / "bf16", SQUARE, weights), CPU),
    )


def report(source: Reader, target: Reader, both: bool = False, longest: int = 40) -> ParityReport:
    tokens = token_set(source.config, longest, positions=0)
    return compare(source, target, tokens, load_limits("lossless"), CPU, both=both)


def but_for_once(found: ParityReport) -> str:
    """Every digit of a report, but what tells how it was computed; as text, where NaN is NaN."""
    plain = asdict(found)
    for layer in plain["layers"]:
        del layer["computed_once"]
    return json.dumps(plain)


def once(found: ParityReport) -> list[bool]:
    return [layer.computed_once for layer in found.layers]


class Multiplied(TorchDispatchMode):
    """Counts the multiplications of products."""

    count = 0

    def __torch_dispatch__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, func: OpOverload, types: object, args: tuple[Any, ...], kwargs: Any = None
    ) -> object:
        if func.overloadpacket.__name__ in {"mm", "addmm", "linear", "bmm"}:
            x, weight = [one for one in args if isinstance(one, Tensor) and one.ndim > 1][:2]
            self.count += x.numel() * weight.shape[-2 if weight.ndim == 2 else -1]
        return func(*args, **(kwargs or {}))


def test_equal_models_are_computed_once_and_reported_the_same(readers: Readers) -> None:
    source, *targets = readers
    for target in targets:
        with Multiplied() as twice:
            expected = report(source, target, both=True)
        with Multiplied() as single:
            found = report(source, target)
        assert 2 * single.count == twice.count > 0
        assert once(found) == [True] * 4
        assert once(expected) == [False] * 4
        assert but_for_once(found) == but_for_once(expected)


def test_both_are_computed_from_the_first_layer_that_differs(readers: Readers) -> None:
    source, target, _ = readers
    wrong = MutantReader(target, Mutant("x", mapped("o_bias", lambda b: b + b)), target)
    found = report(source, wrong)
    assert once(found) == [True, False, False, False]
    assert found.first_over is not None and found.first_over.layer == 1
    assert but_for_once(found) == but_for_once(report(source, wrong, both=True))


def test_an_expert_that_nobody_chose_parts_one_layer_only(readers: Readers) -> None:
    source, target, _ = readers
    tokens = (sequence("runs", 3, 0, SQUARE.vocab),)
    limits = load_limits("lossless")
    cold = compare(source, target, tokens, limits, CPU, extra_rounds=0).layers[1].cold_experts[0]
    wrong = MutantReader(target, Mutant("x", zeroed_expert(cold)), target)
    found = compare(source, wrong, tokens, limits, CPU, extra_rounds=0)
    assert found.passed
    assert once(found) == [True, False, True, True]


def test_a_number_parts_the_layers_that_it_concerns(readers: Readers) -> None:
    source, target, _ = readers
    sliding = (*SQUARE_SLIDING[:2], not SQUARE_SLIDING[2], *SQUARE_SLIDING[3:])
    wrong = MutantReader(target, Mutant("x", config=with_numbers(sliding=sliding)), target)
    assert once(report(source, wrong)) == [True, True, False, False]
    wrong = MutantReader(target, Mutant("x", config=with_numbers(norm_eps=1e-6)), target)
    assert once(report(source, wrong)) == [False] * 4


SQUARE_SLIDING = (True, False, True, False)


def test_a_head_that_differs_is_computed_for_both(readers: Readers) -> None:
    source, target, _ = readers
    assert source.config.sliding == SQUARE_SLIDING
    for mutant in (
        Mutant("norm", norm=lambda norm: norm * 2),
        Mutant("unembedding", unembedding=lambda own, other: own.roll(1, 0)),
    ):
        found = report(source, MutantReader(target, mutant, target))
        assert once(found) == [True] * 4
        assert found.overall.max_delta > 0


def test_same_values_are_told_bit_by_bit_however_encoded() -> None:
    gen = torch.Generator().manual_seed(1)
    packed = Packed(
        torch.randint(0, 256, (3, 4, 2, 16), generator=gen, dtype=torch.uint8),
        torch.randint(100, 130, (3, 4, 2), generator=gen, dtype=torch.uint8),
    )
    dense = packed.decode(torch.bfloat16)
    assert same_values(packed, dense) and same_values(dense, packed)
    assert same_values(packed, Packed(packed.blocks.clone(), packed.scales.clone()))
    assert same_values(dense, dense.float()) and same_values(dense.float(), packed)
    assert not same_values(dense[:2], dense)
    for index in ((0, 0, 0), (2, 3, 63), (1, 2, 31)):
        other = dense.clone()
        other.view(torch.int16)[index] ^= 1
        assert not same_values(packed, other) and not same_values(dense, other.float())
    signed = torch.tensor([0.0, float("nan")])
    assert same_values(signed, signed.clone())
    assert not same_values(signed, torch.tensor([-0.0, float("nan")]))
    # Blocks that differ and mean the same: twice the codes at half the scale.
    ones, twos = (torch.full((1, 1, 1, 16), code, dtype=torch.uint8) for code in (0x22, 0x44))
    scales = torch.tensor([[[120]]], dtype=torch.uint8)
    assert same_values(Packed(twos, scales), Packed(ones, scales + 1))
    assert not same_values(Packed(twos, scales), Packed(ones, scales))


def test_every_weight_of_a_layer_counts(readers: Readers) -> None:
    reader = readers[2]
    layer, configs = reader.layer(0), (reader.config, reader.config)
    assert same_layer(configs, 0, layer, layer)
    for name, weight in vars(layer).items():
        other = weight.clone()
        other.view(torch.int16).view(-1)[-1] ^= 1
        assert not same_layer(configs, 0, layer, replace(layer, **{name: other})), name

"""Split products are as exact as float32 ones, here as torch models them; on a GPU: `gpu`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from gptoss_convert.containers.torch_dist import read
from gptoss_convert.witness import products
from gptoss_convert.witness.forward import Numerics, operand
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.megatron import MegatronReader
from gptoss_convert.witness.openai import OpenAiReader
from gptoss_convert.witness.walk import Prompts, all_logits
from tests.test_forward import CPU, sequences
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4, write_megatron, write_openai
from tests.tiny_models import DISTINCT, SQUARE, TinyShape, random_weights

SPLIT = Numerics(split=True)


def test_three_parts_are_the_number_itself() -> None:
    gen = torch.Generator().manual_seed(1)
    x = torch.randn(2000, generator=gen) * 10.0 ** torch.randint(-20, 20, (2000,), generator=gen)
    parts = products.split(x)
    assert parts.dtype == torch.bfloat16 and parts.shape == (3, 2000)
    assert torch.equal(parts.double().sum(0), x.double())
    rounded = x.to(torch.bfloat16)
    assert torch.equal(products.split(rounded), rounded[None])


def test_a_split_product_is_nearer_to_the_truth_than_a_float32_one() -> None:
    gen = torch.Generator().manual_seed(2)
    x, bias = torch.randn(50, 700, generator=gen), torch.randn(30, generator=gen)
    weight = torch.randn(30, 700, generator=gen).to(torch.bfloat16)
    truth = x.double() @ weight.double().t() + bias.double()
    found = products.linear(x, weight, bias)
    assert found.dtype == torch.float32
    assert (found - truth).norm() < 3e-7 * truth.norm()


def test_only_weights_that_bf16_holds_are_operands_in_bf16() -> None:
    weight = torch.tensor([[1.0, 1.0 + 2**-7]])
    assert operand(weight, SPLIT).dtype == torch.bfloat16
    assert operand(weight, Numerics()).dtype == torch.float32
    assert operand(weight + 2**-9, SPLIT).dtype == torch.float32
    packed = Packed(torch.zeros(1, 1, 16, dtype=torch.uint8), torch.zeros(1, 1, dtype=torch.uint8))
    assert operand(packed, SPLIT).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [DISTINCT, SQUARE], ids=["distinct", "square"])
def test_the_split_forward_pass_is_the_float32_one(
    tmp_path: Path, shape: TinyShape, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "TOKENS", 50)
    weights = random_weights(shape, seed=3)
    packed = HfReader(write_hf_mxfp4(tmp_path / "mxfp4", shape, weights), CPU)
    iteration = write_megatron(tmp_path / "mcore" / "iter_0000001", shape, weights, pad_vocab=31)
    prompts = Prompts.of(sequences(shape), CPU)
    found, expected = (all_logits(packed, prompts, one) for one in (SPLIT, Numerics()))
    assert 0 < (found - expected).abs().max() < 3e-5
    coarse = Numerics(torch.bfloat16)
    rounded = all_logits(packed, prompts, replace(coarse, split=True))
    assert (rounded.float() - all_logits(packed, prompts, coarse).float()).abs().median() < 0.2
    for other in (
        HfReader(write_hf_bf16(tmp_path / "bf16", shape, weights), CPU),
        OpenAiReader(write_openai(tmp_path / "original", shape, weights), CPU),
        MegatronReader(iteration, read(iteration).chunks, packed.config, CPU),
    ):
        assert torch.equal(all_logits(other, prompts, SPLIT), found)

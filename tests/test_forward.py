from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoss_convert.witness.forward import Numerics, attend, dense, query_blocks, swiglu
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.oracles import transformers_logits
from gptoss_convert.witness.walk import Prompts, all_logits
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4
from tests.tiny_models import DISTINCT, SQUARE, TinyShape, random_weights

CPU = torch.device("cpu")


def sequences(shape: TinyShape, seed: int = 0) -> list[list[int]]:
    """Two prompts, one beyond the window and the original YaRN length, one short."""
    gen = torch.Generator().manual_seed(seed)
    lengths = (2 * shape.original_length + 3, shape.window + 1)
    return [torch.randint(0, shape.vocab, (n,), generator=gen).tolist() for n in lengths]


@pytest.mark.parametrize("shape", [DISTINCT, SQUARE], ids=["distinct", "square"])
@pytest.mark.parametrize("write", [write_hf_bf16, write_hf_mxfp4])
def test_logits_agree_with_transformers(tmp_path: Path, shape: TinyShape, write) -> None:
    directory = write(tmp_path / "hf", shape, random_weights(shape, seed=1))
    prompts = sequences(shape)
    ours = all_logits(HfReader(directory, CPU), Prompts.of(prompts, CPU), Numerics())
    theirs = torch.cat(transformers_logits(directory, prompts, CPU))
    assert theirs.std() > 1
    assert (ours - theirs).abs().max() < 5e-5


def naive_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, window: int | None) -> Tensor:
    """One query at a time in float64: the keys it may see, the sink as one more logit."""
    length, heads, head_dim = q.shape
    mixed = torch.empty(q.shape, dtype=torch.float64)
    for s in range(length):
        first = 0 if window is None else max(0, s - window + 1)
        for n in range(heads):
            kv = n // (heads // k.shape[1])
            scores = k[first : s + 1, kv].double() @ q[s, n].double() / head_dim**0.5
            shares = torch.cat((scores, sinks[n : n + 1].double())).softmax(0)
            mixed[s, n] = shares[:-1] @ v[first : s + 1, kv].double()
    return mixed


@pytest.mark.parametrize("window", [None, 1, 16])
@pytest.mark.parametrize("length", [1, 15, 16, 17, 33])
def test_attention_agrees_with_a_naive_one_at_every_block_size(
    length: int, window: int | None
) -> None:
    gen = torch.Generator().manual_seed(length)
    q = torch.randn(length, 6, 8, generator=gen) * 3
    k, v = torch.randn(2, length, 2, 8, generator=gen).unbind()
    sinks = torch.randn(6, generator=gen)
    expected = naive_attention(q, k, v, sinks, window)
    for elements in (1, 6 * length, 12 * length + 5, 7 * 6 * (7 + 16), 1 << 20):
        found = attend(q, k, v, sinks, window, elements)
        assert (found - expected).abs().max() < 2e-6, elements


@pytest.mark.parametrize("window", [None, 128])
def test_query_blocks_cover_every_position_once_within_the_bound(window: int | None) -> None:
    for length in (1, 127, 128, 4097, 131072):
        blocks = list(query_blocks(length, 64, window, 1 << 28))
        assert [start for start, _ in blocks] == [0, *(stop for _, stop in blocks[:-1])]
        assert blocks[-1][1] == length
        seen = (stop - max(0, start - window + 1) if window else stop for start, stop in blocks)
        for (start, stop), keys in zip(blocks, seen, strict=True):
            assert 64 * (stop - start) * keys <= 1 << 28


def test_the_gate_is_clamped_from_above_only(tmp_path: Path) -> None:
    config = HfReader(write_hf_bf16(tmp_path / "hf", SQUARE, random_weights(SQUARE)), CPU).config
    gate, up = torch.tensor([-20.0, 9.0, 1.0]), torch.tensor([9.0, -9.0, 0.5])
    low = -20 / (1 + math.exp(1.702 * 20)) * 8
    high = 7 / (1 + math.exp(-1.702 * 7)) * -6
    middle = 1 / (1 + math.exp(-1.702)) * 1.5
    expected = torch.tensor([low, high, middle])
    assert torch.allclose(swiglu(gate, up, config), expected, rtol=1e-6, atol=0)


def test_bf16_runs_and_stays_near_float32(tmp_path: Path) -> None:
    directory = write_hf_bf16(tmp_path / "hf", SQUARE, random_weights(SQUARE, seed=5))
    reader, prompts = HfReader(directory, CPU), Prompts.of(sequences(SQUARE), CPU)
    exact = all_logits(reader, prompts, Numerics())
    rounded = all_logits(reader, prompts, Numerics(dtype=torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    # Flipped routings make single positions differ much in a tiny random model; most do not flip.
    assert (exact - rounded.float()).abs().median() < 0.1


def test_a_sequence_does_not_see_its_neighbour(tmp_path: Path) -> None:
    directory = write_hf_mxfp4(tmp_path / "hf", SQUARE, random_weights(SQUARE, seed=6))
    reader, prompts = HfReader(directory, CPU), sequences(SQUARE)
    together = all_logits(reader, Prompts.of(prompts, CPU), Numerics())
    alone = [all_logits(reader, Prompts.of([one], CPU), Numerics()) for one in prompts]
    assert (together - torch.cat(alone)).abs().max() < 5e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_operands_are_row_major_and_alone_where_an_allocation_begins(dtype: torch.dtype) -> None:
    stored = torch.arange(60.0).view(4, 15).to(torch.bfloat16)
    for view in (stored, stored[:3], stored[1:], stored.t(), stored[:, 1::2]):
        found = dense(view, dtype)
        assert found.stride() == (view.shape[1], 1)
        assert found.data_ptr() == found.untyped_storage().data_ptr()
        assert found.data_ptr() % 64 == 0
        assert found.untyped_storage().nbytes() == found.nbytes
        assert torch.equal(found, view.to(dtype))
    assert dense(stored, torch.bfloat16) is stored

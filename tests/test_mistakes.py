"""Each mistake of an engine is what code written for it alone computes, and moves the answers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoss_convert.witness import forward
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.fp4 import Packed
from gptoss_convert.witness.fp8 import rounded
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.mistakes import MISTAKES, Mistake, MistakenReader
from gptoss_convert.witness.tokens import sequence
from gptoss_convert.witness.walk import Prompts, all_logits
from tests.mutants import interleaved_rotary, no_concentration, presoftmax, swiglu_like
from tests.tiny_files import write_hf_mxfp4
from tests.tiny_models import DISTINCT, SQUARE, random_weights

CPU = torch.device("cpu")
SEQUENCES = (sequence("text", 40, 0, 256), sequence("uniform", 160, 0, 256))
PROMPTS = Prompts.of([one.tokens for one in SEQUENCES], CPU)
BY_NAME = {mistake.name: mistake for mistake in MISTAKES}


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> HfReader:
    folder = tmp_path_factory.mktemp("square") / "model"
    return HfReader(write_hf_mxfp4(folder, SQUARE, random_weights(SQUARE, seed=5)), CPU)


@pytest.fixture(scope="module")
def answers(reader: HfReader) -> dict[str, Tensor]:
    """Logits of the model, under the empty name, and with each mistake."""
    mistaken = {
        m.name: all_logits(MistakenReader(reader, m), PROMPTS, Numerics()) for m in MISTAKES
    }
    return {"": all_logits(reader, PROMPTS, Numerics()), **mistaken}


def test_no_mistake_is_no_other_one_nor_the_model(answers: dict[str, Tensor]) -> None:
    names = [*answers]
    for n, one in enumerate(names):
        for other in names[:n]:
            distance = (answers[one] - answers[other]).abs().max()
            assert distance > 0.05, f"{one!r} and {other!r}"


OTHERWISE = {
    "YaRN's concentration were missing": ("rotary_tables", no_concentration),
    "rotary embedding were interleaved": ("rotate", interleaved_rotary),
    "SwiGLU's +1 were missing": ("swiglu", swiglu_like(-torch.inf, 7.0, 0.0)),
    "the router's softmax came before its choice": ("route", presoftmax),
}
"""Functions of the forward pass that make a mistake by code of their own."""


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_mistake_is_what_code_of_its_own_computes(
    reader: HfReader, answers: dict[str, Tensor], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    function, code = OTHERWISE[name]
    monkeypatch.setattr(forward, function, code)
    torch.testing.assert_close(
        all_logits(reader, PROMPTS, Numerics()), answers[name], rtol=0, atol=2e-5
    )


def test_down_is_transposed_value_by_value(reader: HfReader) -> None:
    given = reader.layer(2).down_weight
    assert isinstance(given, Packed)
    found = BY_NAME["down were transposed"].weights(reader.layer(2)).down_weight
    dense = given.decode(torch.float32)
    assert isinstance(found, Tensor)
    assert all(found[3, a, b] == dense[3, b, a] for a, b in ((0, 1), (5, 77), (127, 0)))


def test_a_mistake_that_the_model_cannot_suffer_is_not_looked_for(tmp_path: Path) -> None:
    wide = HfReader(write_hf_mxfp4(tmp_path / "m", DISTINCT, random_weights(DISTINCT, 1)), CPU)
    impossible = [m.name for m in MISTAKES if not m.possible(wide.config)]
    assert impossible == ["down were transposed"]
    already = replace(wide.config, rope_truncate=True)
    assert not BY_NAME["YaRN's range were rounded (truncate = true)"].possible(already)


def test_rounding_through_fp8_keeps_three_bits_and_every_power_of_two() -> None:
    sizes = 2.0 ** torch.arange(-90, 120, 30).view(7, 1)
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1)) * sizes
    assert rounded(x, None) is x
    found = rounded(x, torch.float8_e4m3fn)
    blocks = x.view(7, 2, 32)
    # A block's largest value may saturate at 448/512 of its octave; small ones lose bits.
    near = (found.view(7, 2, 32) - blocks).abs() / blocks.abs().amax(-1, keepdim=True)
    assert 0.01 < near.max() <= 0.125
    powers = 2.0 ** torch.arange(-4.0, 4.0).repeat(4).view(1, 32)
    assert torch.equal(rounded(powers, torch.float8_e4m3fn), powers)
    assert rounded(x.bfloat16(), torch.float8_e4m3fn).dtype == torch.bfloat16
    assert torch.equal(rounded(torch.zeros(1, 32), torch.float8_e4m3fn), torch.zeros(1, 32))


def test_a_mistake_is_made_in_every_layer(reader: HfReader) -> None:
    mistake = Mistake("x", weights=BY_NAME["all biases were dropped"].weights)
    for index in range(SQUARE.layers):
        layer = MistakenReader(reader, mistake).layer(index)
        biases = {name: value for name, value in vars(layer).items() if name.endswith("_bias")}
        assert len(biases) == 8
        assert not any(value.any() for value in biases.values())

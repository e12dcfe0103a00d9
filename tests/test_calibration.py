"""What a calibration asks of each matrix, against the two models walked by themselves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptoss_convert import convert
from gptoss_convert.quantise import calibration
from gptoss_convert.quantise.calibrated import Moments
from gptoss_convert.quantise.calibration import group_size
from gptoss_convert.quantise.run import LONGEST, MOST_TOKENS, split
from gptoss_convert.quantise.streams import Streams
from gptoss_convert.verify.prompts import own_sequences
from gptoss_convert.witness import forward
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.model import ExpertMatrices
from gptoss_convert.witness.tokens import TokenSequence, passages
from gptoss_convert.witness.walk import Prompts, walk
from tests.test_lossy import SHAPE, UNTOUCHED, folder, options

__all__ = ["folder"]
CPU = torch.device("cpu")
LEFT = [e for e in range(SHAPE.experts) if e != UNTOUCHED]
Asked = list[tuple[Tensor, Moments]]


@pytest.fixture(scope="module")
def asked(folder: Path) -> Asked:
    """The weights and moments that each matrix was rounded with: gate_up and down of each layer."""
    found: Asked = []
    round_matrices = calibration.round_matrices

    def recording(weights: Tensor, moments: Moments, *more: Any) -> Any:
        found.append((weights, moments))
        return round_matrices(weights, moments, *more)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(calibration, "round_matrices", recording)
        convert(folder / "tuned", folder / "recorded", options(folder))
    assert len(found) == 2 * SHAPE.layers
    return found


def after_attention(directory: Path, tokens: list[list[int]], layer: int) -> Tensor:
    """A checkpoint's own residual stream behind the attention of a layer."""
    reader = HfReader(directory, CPU)
    with forward.exact_products():
        for state in walk(reader, [Prompts.of(tokens, CPU)], Numerics()):
            if (state.layer, state.block) == (layer, "attention"):
                return state.values[0].clone()
    raise AssertionError(layer)


@pytest.mark.parametrize("layer", range(SHAPE.layers))
def test_inputs_are_the_rounded_models_and_outputs_the_tuned_ones(
    folder: Path, asked: Asked, layer: int
):
    sequences = own_sequences(folder / "tokens.jsonl", None, (), SHAPE.vocab)
    tokens, held_out = split(sequences)
    assert len(held_out) == 1
    tuned, rounded = (
        after_attention(folder / name, tokens, layer) for name in ("tuned", "recorded")
    )
    if layer:
        assert (tuned - rounded).norm() > 1e-4 * tuned.norm()
    config = HfReader(folder / "tuned", CPU).config
    ours, theirs = (HfReader(folder / name, CPU).layer(layer) for name in ("tuned", "recorded"))
    our_gate, our_up, our_down = map(values, (ours.gate_weight, ours.up_weight, ours.down_weight))
    gate, up = values(theirs.gate_weight), values(theirs.up_weight)
    x0, x = (forward.rms_norm(one, ours.mlp_norm, config.norm_eps) for one in (tuned, rounded))
    logits = x @ ours.router_weight.float().T + ours.router_bias.float()
    top, chosen = logits.topk(config.experts_per_token)
    shares = top.softmax(-1)

    def inner(y: Tensor, gate: Tensor, up: Tensor, e: int) -> Tensor:
        gated, raised = y @ gate.T + ours.gate_bias[e].float(), y @ up.T + ours.up_bias[e].float()
        return forward.swiglu(gated, raised, config)

    for place, e in enumerate(LEFT):
        token, rank = (chosen == e).nonzero(as_tuple=True)
        weight = shares[token, rank].square().double().unsqueeze(1)
        for number, (inputs, outputs) in enumerate(
            (
                (
                    x[token],
                    x0[token] @ torch.cat((our_gate[e], our_up[e])).T,
                ),
                (
                    inner(x[token], gate[e], up[e], e),
                    inner(x0[token], our_gate[e], our_up[e], e) @ our_down[e].T
                    + (tuned - rounded)[token],
                ),
            )
        ):
            _, moments = asked[2 * layer + number]
            weighed = (inputs.double() * weight).T
            close(moments.inputs[place], weighed @ inputs.double())
            close(moments.outputs[place], weighed @ outputs.double())
            assert moments.tokens[place] == len(token) > 0


def values(matrix: ExpertMatrices) -> Tensor:
    return forward.dense(matrix, torch.float32)


def close(found: Tensor, expected: Tensor) -> None:
    assert (found.double() - expected).norm() < 2e-5 * expected.norm()


def test_matrices_are_input_major_gate_before_up(folder: Path, asked: Asked):
    for layer in range(SHAPE.layers):
        held = HfReader(folder / "tuned", CPU).layer(layer)
        gate_up, down = (asked[2 * layer + n][0] for n in range(2))
        both = torch.cat((values(held.gate_weight), values(held.up_weight)), 1)[LEFT]
        assert torch.equal(gate_up, both.transpose(1, 2))
        assert torch.equal(down, values(held.down_weight)[LEFT].transpose(1, 2))


def test_every_eighth_passage_is_held_out_and_long_ones_are_cut():
    pieces, held_out = split([TokenSequence("a", tuple(range(9 * LONGEST + 5)))])
    assert [len(one) for one in pieces] == [LONGEST] * 8 + [5]
    assert held_out == [[*range(7 * LONGEST, 8 * LONGEST)]]
    short, last = split([TokenSequence("b", tuple(range(80)))])
    assert (short, last) == ([[*range(70)]], [[*range(70, 80)]])
    assert split([TokenSequence("c", (1,))]) == ([[1]], [])
    many, some = split([TokenSequence("d", tuple([0] * (MOST_TOKENS + 5 * LONGEST)))])
    assert sum(map(len, [*many, *some])) == MOST_TOKENS


def test_the_texts_of_the_package_are_held_out_by_whole_passages():
    """What `verify --limits lossy` takes without tokens is what `auto` does not calibrate on."""
    every = passages(201_088)
    pieces, held_out = split(every)
    assert [tuple(one) for one in held_out] == [one.tokens for one in every[7::8]]
    assert len(pieces) + len(held_out) == len(every)


@pytest.mark.parametrize(("experts", "expected"), [(32, 16), (128, 8)])
def test_groups_of_the_released_models_fit_their_bound(folder: Path, experts: int, expected: int):
    small = HfReader(folder / "tuned", CPU).config
    assert group_size(small) == SHAPE.experts
    assert group_size(replace(small, hidden=2880, inter=2880, experts=experts)) == expected


def test_streams_on_the_disk_hold_what_they_are_given(tmp_path: Path):
    gen = torch.Generator().manual_seed(0)
    first = [torch.randn(n, 8, generator=gen) for n in (3, 1, 5)]
    streams = Streams(first, tmp_path)
    assert len(streams) == 3 and not list(tmp_path.iterdir())
    assert all(torch.equal(streams[n], one) for n, one in enumerate(first))
    streams[2] = first[2] * 2
    assert torch.equal(streams[2], first[2] * 2) and torch.equal(streams[0], first[0])


def test_a_calibration_that_spills_gives_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gptoss_convert.quantise import run
    from tests.test_lossy import experts

    convert(folder / "tuned", tmp_path / "kept", options(folder))
    monkeypatch.setattr(run, "_spill", lambda batches, hidden, device, folder: folder)
    convert(folder / "tuned", tmp_path / "spilled", options(folder))
    one, other = experts(tmp_path / "kept"), experts(tmp_path / "spilled")
    assert all(torch.equal(one[name], other[name]) for name in one)

"""The gate for a fine-tune and its MXFP4: what counts, by how much, and where it was lost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptoss_convert import Options, convert
from gptoss_convert.errors import UsageError
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import Verification, VerifyOptions
from gptoss_convert.witness import forward
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.limits import lossy_share
from gptoss_convert.witness.tokens import TokenSequence, passages
from gptoss_convert.witness.update import _by_expert, update_kept
from gptoss_convert.witness.walk import Prompts, all_logits, with_operands
from tests.test_lossy import SHAPE, UNTOUCHED, folder, options

__all__ = ["folder"]
CPU = torch.device("cpu")


def verified(folder: Path, target: str, **more: object) -> Verification:
    given = {"limits": "lossy", "tokens": folder / "tokens.jsonl", **more}
    return verify_checkpoints(folder / "tuned", folder / target, VerifyOptions(**given))  # pyright: ignore


def log_shares(directory: Path, tokens: list[tuple[int, ...]]) -> Tensor:
    logits = all_logits(HfReader(directory, CPU), Prompts.of(tokens, CPU), Numerics())
    return logits.double().log_softmax(-1)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_both_divergences_are_those_of_the_logits(folder: Path):
    convert(folder / "tuned", folder / "made", options(folder, lossy="stochastic"))
    tokens = [one.tokens for one in passages(SHAPE.vocab)[:3]]
    sides = [HfReader(folder / name, CPU) for name in ("tuned", "made", "base")]
    sequences = [TokenSequence(str(n), one) for n, one in enumerate(tokens)]
    found = update_kept(sides[0], sides[1], sides[2], sequences, CPU, Numerics())
    tuned, made, base = (log_shares(folder / name, tokens) for name in ("tuned", "made", "base"))
    assert math.isclose(found.kl, kl(tuned, made), rel_tol=1e-6)
    assert math.isclose(found.kl_base, kl(base, tuned), rel_tol=1e-6)
    assert found.positions == sum(map(len, tokens))


def test_an_update_is_kept_whole_by_the_tune_and_not_at_all_by_the_base(folder: Path):
    sequences = [TokenSequence("one", passages(SHAPE.vocab)[0].tokens)]
    tuned, base = HfReader(folder / "tuned", CPU), HfReader(folder / "base", CPU)
    whole = update_kept(tuned, tuned, base, sequences, CPU, Numerics())
    none = update_kept(tuned, base, base, sequences, CPU, Numerics())
    assert whole.kl == 0 and math.isclose(none.kl_base, whole.kl_base)
    for one, other in zip(whole.layers, none.layers, strict=True):
        assert one.stream_error == 0 and other.stream_error == other.stream_update > 0
        assert one.tokens == other.tokens and sum(one.tokens) == 4 * whole.positions
        for e in range(SHAPE.experts):
            if e == UNTOUCHED:
                assert one.kept[e] is None and other.error[e] is None
            else:
                assert (one.kept[e], one.error[e]) == (1, 0)
                assert (other.kept[e], other.error[e]) == (0, 1)


def test_half_an_update_is_half_kept(folder: Path):
    """Experts halfway between base and tune in down alone, which is linear."""
    weights = HfReader(folder / "tuned", CPU).layer(1)
    base = with_operands(HfReader(folder / "base", CPU).layer(1), Numerics())
    x = torch.randn(50, SHAPE.hidden, generator=torch.Generator().manual_seed(0))
    whole = base.down_weight.decode(torch.float32)  # pyright: ignore[reportAttributeAccessIssue]
    tuned = replace(base, down_weight=weights.down_weight)
    half = replace(base, down_weight=(whole + weights.down_weight.float()) / 2)  # pyright: ignore
    config = HfReader(folder / "tuned", CPU).config
    with forward.exact_products():
        _, kept, error = _by_expert(x, [tuned, half, base], config)
    for e in range(SHAPE.experts):
        if e != UNTOUCHED:
            assert kept[e] == pytest.approx(0.5, abs=1e-4)
            assert error[e] == pytest.approx(0.5, abs=1e-4)


def test_the_base_passed_off_as_the_tune_fails(folder: Path):
    convert(
        folder / "tuned", folder / "nearest", options(folder, lossy="nearest", scale_rule="best")
    )
    found = verified(folder, "nearest", base=folder / "base")
    assert not found.same and "the update is not kept" in found.verdict
    numbers = found.levels[-1].numbers
    assert numbers["update"]["kl"] > lossy_share() * numbers["update"]["kl_base"]


def test_ones_own_limit_decides_and_is_inclusive_of_nothing_beyond(folder: Path):
    convert(folder / "tuned", folder / "own", options(folder, lossy="stochastic"))
    first = verified(folder, "own", max_kl=1.0)
    mean = first.levels[-1].numbers["overall"]["kl_mean"]
    assert first.same and mean > 0
    assert verified(folder, "own", max_kl=mean * 1.001).same
    refused = verified(folder, "own", max_kl=mean * 0.999)
    assert not refused.same and "mean KL: expects at most" in refused.verdict
    assert not verified(folder, "own", max_kl=mean * 0.999, base=folder / "base").same


def test_without_tokens_the_passages_that_auto_holds_out_are_used(folder: Path):
    found = verified(folder, "base", tokens=None, max_kl=100.0)
    names = [one["name"] for one in found.levels[-1].numbers["sequences"]]
    assert names == [one.name for one in passages(SHAPE.vocab)[7::8]]


@pytest.mark.parametrize("words", [{"base": Path("x")}, {"max_kl": 1.0}])
def test_the_options_of_the_lossy_gate_go_with_it(folder: Path, words: dict[str, object]):
    with pytest.raises(UsageError, match="goes with --limits lossy"):
        verify_checkpoints(folder / "tuned", folder / "tuned", VerifyOptions(**words))  # pyright: ignore


def test_a_base_of_another_size_is_refused(folder: Path, tmp_path: Path):
    from gptoss_convert.synth.synth import synth

    synth(tmp_path / "other")
    with pytest.raises(UsageError, match="another size of model"):
        verified(folder, "base", base=tmp_path / "other")


def test_unchanged_is_kept(folder: Path, tmp_path: Path):
    convert(folder / "base", tmp_path / "same", Options(to="hf", dtype="bf16"))
    assert verify_checkpoints(
        folder / "base", tmp_path / "same", VerifyOptions(limits="lossy", base=folder / "base")
    ).same

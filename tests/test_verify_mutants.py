"""Every mutant is caught beyond float32 rounding, every harmless change passes bit by bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path

import pytest
import torch

from gptoss_convert.witness import forward, metrics
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.limits import load_limits
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.parity import compare
from gptoss_convert.witness.parity_report import ParityReport
from gptoss_convert.witness.tokens import TokenSequence, token_set
from gptoss_convert.witness.walk import Prompts, all_logits, walk
from tests.mutants import BELOW_ROUNDING, HARMLESS, MUTANTS, Mutant, MutantReader, zeroed_expert
from tests.test_verify_together import but_for_once
from tests.tiny_files import write_hf_mxfp4
from tests.tiny_models import SQUARE, random_weights

CPU = torch.device("cpu")
RELEASED = ModelConfig(
    hidden=2880, inter=2880, heads=64, kv_heads=8, head_dim=64, experts=32, experts_per_token=4,
    vocab=201088, sliding=(True, False), window=128, rope_theta=150000.0, rope_factor=32.0,
    rope_original_length=256, rope_beta_fast=32.0, rope_beta_slow=1.0, rope_truncate=False,
    swiglu_alpha=1.702, swiglu_limit=7.0, norm_eps=1e-5,
)  # fmt: skip
"""Any config will do to see whether a mutant changes its numbers."""


@dataclass(frozen=True)
class Models:
    """A model, another one of the same sizes, and the tokens they are compared on."""

    source: HfReader
    stale: HfReader
    sequences: tuple[TokenSequence, ...]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return tiny_models(tmp_path_factory.mktemp("models"))


def tiny_models(folder: Path) -> Models:
    source, stale = (
        HfReader(write_hf_mxfp4(folder / str(seed), SQUARE, random_weights(SQUARE, seed)), CPU)
        for seed in (1, 2)
    )
    return Models(source, stale, token_set(source.config, longest=129, positions=0))


def compared(models: Models, mutant: Mutant, limits: str, both: bool = True) -> ParityReport:
    target = MutantReader(models.source, mutant, models.stale)
    return compare(models.source, target, models.sequences, load_limits(limits), CPU, both=both)


@contextmanager
def changed_code(mutant: Mutant) -> Iterator[None]:
    assert mutant.code is not None
    name, function = mutant.code
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forward, name, function)
        yield


def max_delta(models: Models, mutant: Mutant) -> float:
    """Max |Δlogit| that a change of the code makes."""
    prompts = Prompts.of([s.tokens for s in models.sequences], CPU)
    clean = all_logits(models.source, prompts, Numerics())
    with changed_code(mutant):
        wrong = all_logits(models.source, prompts, Numerics())
    following = torch.full_like(prompts.tokens, -1)
    return float(metrics.score(clean, wrong, following).max_delta.max())


def least_used_expert(models: Models) -> int:
    prompts = Prompts.of([s.tokens for s in models.sequences], CPU)
    with forward.exact_products():
        walked = walk(models.source, [prompts], Numerics())
        chosen = [state.chosen[0] for state in walked if state.block == "router"][1]
    return int(chosen.flatten().bincount(minlength=SQUARE.experts).argmin())


def with_least_used(models: Models, mutant: Mutant) -> Mutant:
    if mutant.name.startswith("M26"):
        return replace(mutant, layer=zeroed_expert(least_used_expert(models)))
    return mutant


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_is_caught(models: Models, mutant: Mutant) -> None:
    mutant = with_least_used(models, mutant)
    limits = load_limits("float32")
    if mutant.code:
        assert max_delta(models, mutant) > limits.max_delta
        return
    report = compared(models, mutant, "float32")
    assert not report.passed
    assert report.overall.max_delta > limits.max_delta
    # Computing once what is equal must neither hide it nor move a digit.
    assert but_for_once(compared(models, mutant, "float32", both=False)) == but_for_once(report)
    if mutant.layer is not Mutant("").layer or mutant.packed:
        assert report.first_over is not None
        assert report.first_over.layer == 1
        assert report.source_feeding


@pytest.mark.parametrize("mutant", HARMLESS, ids=lambda mutant: mutant.name)
def test_harmless_changes_pass_bit_by_bit(models: Models, mutant: Mutant) -> None:
    report = compared(models, mutant, "lossless")
    assert report.passed, report.violations
    assert report.overall.max_delta == 0


def test_a_gate_clamped_on_both_sides_is_seen_where_exactness_is_asked(models: Models) -> None:
    assert 0 < max_delta(models, BELOW_ROUNDING) < load_limits("float32").max_delta


HEADER = {"window", "sliding", "rope_factor", "rope_original_length", "rope_truncate",
          "swiglu_limit", "norm_eps"}  # fmt: skip
"""Numbers that opening a checkpoint reads and compares, or refuses."""


def levels(mutant: Mutant) -> str:
    """The levels of `verify` that see a checkpoint, or code, with this error."""
    changed = mutant.config(RELEASED)
    names = {f.name for f in fields(ModelConfig) if vars(changed)[f.name] != vars(RELEASED)[f.name]}
    if mutant is BELOW_ROUNDING:
        return "unit test"
    if mutant.code:
        return "oracle"
    if names:
        return "header, logits" if names & HEADER else "logits"
    if mutant in HARMLESS:
        return "values" if mutant.name.startswith("M17") else "none"
    return "values, logits"


def table(folder: Path) -> None:
    """Print every mutant with the levels that catch it, its figure, and where it shows first."""
    models, limit = tiny_models(folder), load_limits("float32")
    print(f"limits: max abs Δlogit {limit.max_delta:g}, relative error {limit.sub_block:g}\n")
    print("| mutant | level | max abs Δlogit | max KL | first sub-block over the limit |")
    print("|---|---|---|---|---|")
    for mutant in (*MUTANTS, BELOW_ROUNDING, *HARMLESS):
        mutant = with_least_used(models, mutant)
        cells = [mutant.name, levels(mutant)]
        if mutant.code:
            cells += [f"{max_delta(models, mutant):.3g}", "", "(code)"]
        else:
            report = compared(models, mutant, "float32")
            over = report.first_over
            cells += [f"{report.overall.max_delta:.3g}", f"{report.overall.kl_max:.3g}"]
            cells += [f"layer {over.layer} {over.block}, {over.error:.2g}" if over else "none"]
        print(f"| {' | '.join(cells)} |")
    clean = [compared(models, HARMLESS[0], "lossless").overall.max_delta for _ in range(20)]
    print(f"\n{len(clean)} clean runs: {sum(map(bool, clean))} false alarms")


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        table(Path(folder))

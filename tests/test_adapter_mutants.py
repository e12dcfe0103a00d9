"""Wrong merges, each of which `verify BASE --adapter DIR MERGED` must notice, and name.

The right merge and the wrong ones are made here, by hand, in PEFT's layout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import Verification, VerifyOptions
from tests.adapter_files import write_adapter
from tests.tiny_adapters import ALPHA, ATTENTION, EXPERTS, RANK, peft_tensors, settings
from tests.tiny_files import write_hf_bf16
from tests.tiny_models import SQUARE, hf_bf16_tensors, random_weights

PATTERN = {"layers.2.self_attn.v_proj": 48}
"""The alpha of one module is four times that of the others."""
Update = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Merge:
    """A merge of an adapter as somebody could write it; the defaults are right."""

    scale: float = ALPHA / RANK
    pattern: bool = True
    times: int = 1
    grouped: bool = False
    """Whether lora_B's columns are taken expert by expert."""
    gate_up: Update = lambda update: update
    """Of an expert's update, input-major."""
    down: Update = lambda update: update
    expert: int = 0
    """By how many the experts are shifted."""
    without: str = "nothing"
    """Tensors whose names hold this are left as the base has them."""

    def apply(self, base: Mapping[str, Tensor], halves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The merged tensors of a Hugging Face BF16 directory."""
        merged = dict(base)
        for name, a in halves.items():
            if ".lora_A." not in name:
                continue
            stem = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            b = halves[name.replace(".lora_A.", ".lora_B.")]
            for _ in range(self.times):
                if ".experts" in stem:
                    self._experts(merged, stem, a, b)
                elif self.without not in f"{stem}.weight":
                    own = PATTERN["layers.2.self_attn.v_proj"] / RANK
                    here = self.pattern and stem.endswith("layers.2.self_attn.v_proj")
                    update = (own if here else self.scale) * (b.double() @ a.double())
                    merged[f"{stem}.weight"] = rounded(merged[f"{stem}.weight"], update)
        return merged

    def _experts(self, merged: dict[str, Tensor], stem: str, a: Tensor, b: Tensor) -> None:
        inner = stem.endswith(".base_layer")
        edit = self.gate_up if inner else self.down
        name = f"{stem.removesuffix('.base_layer')}.{'gate_up' if inner else 'down'}_proj"
        if self.without in name:
            return
        experts = SQUARE.experts
        weight = merged[name].clone()
        for expert in range(experts):
            span = slice(RANK * expert, RANK * (expert + 1))
            columns = b[:, span] if self.grouped else b[:, expert::experts]
            own = columns.double() @ a[span].double()
            target = (expert + self.expert) % experts
            weight[target] = rounded(weight[target], self.scale * edit(own.T))
        merged[name] = weight


def rounded(weight: Tensor, update: Tensor) -> Tensor:
    """The sum, rounded once: what float32 loses on the way sets its last bit (round to odd)."""
    exact = weight.double() + update
    near = exact.float()
    beyond = (near.double().abs() > exact.abs()).int()
    odd = near.view(torch.int32) - beyond | 1
    return torch.where(near.double() != exact, odd.view(torch.float32), near).bfloat16()


def halves_for_interleaved(update: Tensor) -> Tensor:
    """`[in, out]` whose columns alternate between gate and up, as if they were halves."""
    gate, up = update[:, 0::2], update[:, 1::2]
    return torch.cat((gate, up), dim=1)


def gate_for_up(update: Tensor) -> Tensor:
    return update.unflatten(1, (-1, 2)).flip(2).flatten(1)


RIGHT = Merge()
MUTANTS: dict[str, tuple[Merge, str, str]] = {
    "lora_B read in the other order": (
        Merge(grouped=True),
        "experts",
        "merged with lora_B read in the other order",
    ),
    "alpha / sqrt(r)": (
        Merge(scale=ALPHA / RANK**0.5),
        "attention",
        "merged 1.73 times as strong",
    ),
    "scale dropped": (Merge(scale=1.0), "attention", "merged 0.25 times as strong"),
    "pattern ignored": (Merge(pattern=False), "layer 2 attention", "merged 0.25 times as strong"),
    "transposed down": (
        Merge(down=lambda update: update.T),
        "experts",
        "merged with its update transposed",
    ),
    "gate and up exchanged": (
        Merge(gate_up=gate_for_up),
        "experts",
        "merged with its update exchanged between gate and up",
    ),
    "halves for interleaved": (
        Merge(gate_up=halves_for_interleaved),
        "experts",
        "merged with its update in halves for interleaved",
    ),
    "a layer dropped": (Merge(without="layers.3."), "layer 3 attention", "not merged"),
    "experts dropped": (Merge(without="mlp.experts"), "experts", "not merged"),
    "attention dropped": (Merge(without="self_attn"), "attention", "not merged"),
    "shifted experts": (Merge(expert=1), "experts", "merged with its update shifted by one expert"),
    "applied twice": (Merge(times=2), "attention", "merged 2 times as strong"),
    "not applied": (Merge(times=0), "attention", "not merged"),
}
"""By name: the merge, how the first finding begins to say where it is, and what it looks like."""


@dataclass(frozen=True)
class Case:
    """A base, another base, an adapter, and the tensors of both bases."""

    root: Path
    adapter: Path
    tensors: Mapping[str, Tensor]
    other: Mapping[str, Tensor]
    halves: Mapping[str, Tensor]


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    root = tmp_path_factory.mktemp("mutants")
    weights, others = (random_weights(SQUARE, seed) for seed in (3, 4))
    write_hf_bf16(root / "base", SQUARE, weights)
    halves = peft_tensors(SQUARE, [ATTENTION, EXPERTS], size=0.2)
    adapter = write_adapter(root / "adapter", halves, settings(alpha_pattern=PATTERN))
    return Case(root, adapter, hf_bf16_tensors(weights), hf_bf16_tensors(others), halves)


def judged(case: Case, merge: Merge, target: Path, base: Mapping[str, Tensor]) -> Verification:
    target.mkdir()
    save_file(
        {name: tensor.contiguous() for name, tensor in merge.apply(base, case.halves).items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    (target / "config.json").write_bytes((case.root / "base" / "config.json").read_bytes())
    options = VerifyOptions(level="logits", sample=64, max_length=64, adapter=str(case.adapter))
    return verify_checkpoints(case.root / "base", target, options)


def test_the_right_merge_is_the_same_model(case: Case, tmp_path: Path):
    assert judged(case, RIGHT, tmp_path / "merged", case.tensors).same


@pytest.mark.parametrize("name", MUTANTS)
def test_every_wrong_merge_is_caught_by_values_and_by_logits(case: Case, name: str, tmp_path: Path):
    merge, place, looks = MUTANTS[name]
    found = judged(case, merge, tmp_path / "merged", case.tensors)
    _, values, logits = found.levels
    assert not values.same
    assert not logits.same, "the witness alone must notice"
    assert place in values.findings[0]
    assert any(f"looks {looks};" in finding for finding in values.findings), values.findings[:3]


def test_a_merge_into_another_base_is_caught(case: Case, tmp_path: Path):
    found = judged(case, RIGHT, tmp_path / "merged", case.other)
    assert not any(level.same for level in found.levels[1:])

"""No vector function meets several threads before it met one alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.verify.oracle_level import oracle_logits
from gptoss_convert.witness.first_calls import VECTOR_FUNCTIONS, settle_kernels
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.limits import load_limits
from gptoss_convert.witness.parity import compare
from gptoss_convert.witness.tokens import sequence
from tests.tiny_files import write_hf_bf16
from tests.tiny_models import SQUARE, random_weights

CPU = torch.device("cpu")


class FirstCalls(TorchDispatchMode):
    """How many elements the first call of each vector function had, by name and dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: dict[tuple[str, torch.dtype], int] = {}
        self.largest: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        name = func.overloadpacket.__name__.removesuffix("_")
        if name in VECTOR_FUNCTIONS:
            self.elements.setdefault((name, args[0].dtype), args[0].numel())
            self.largest[name] = max(self.largest.get(name, 0), args[0].numel())
        return func(*args, **(kwargs or {}))


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    settle_kernels.cache_clear()
    return write_hf_bf16(tmp_path / "hf", SQUARE, random_weights(SQUARE))


def test_every_vector_function_is_called_alone_before_a_comparison_calls_it(
    directory: Path,
) -> None:
    reader = HfReader(directory, CPU)
    tokens = (sequence("text", 129, 0, SQUARE.vocab),)
    with FirstCalls() as calls:
        compare(reader, reader, tokens, load_limits("lossless"), CPU, extra_rounds=0, both=True)
    assert {name for name, count in calls.largest.items() if count > 1} >= {"cos", "sin", "exp"}
    assert set(calls.elements.values()) == {1}


def test_every_vector_function_is_called_alone_before_an_oracle_calls_it(directory: Path) -> None:
    with FirstCalls() as calls:
        found = oracle_logits(
            open_checkpoint(directory), HfReader(directory, CPU).config, [list(range(40))], CPU
        )
    assert not isinstance(found, str)
    assert calls.largest["cos"] > 1
    assert set(calls.elements.values()) == {1}

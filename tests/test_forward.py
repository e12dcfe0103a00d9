from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptoss_convert.verify.forward import Numerics
from gptoss_convert.verify.hf_reader import HfReader
from gptoss_convert.verify.oracles import transformers_logits
from gptoss_convert.verify.walk import Prompts, all_logits
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

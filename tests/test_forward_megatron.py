from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import distributed

from gptoss_convert.containers.torch_dist import read
from gptoss_convert.errors import IntegrityError, UsageError
from gptoss_convert.witness.forward import Numerics
from gptoss_convert.witness.hf import HfReader
from gptoss_convert.witness.megatron import MegatronReader
from gptoss_convert.witness.megatron_oracle import megatron_logits
from gptoss_convert.witness.walk import Prompts, all_logits
from tests.test_forward import CPU, sequences
from tests.tiny_files import write_hf_mxfp4, write_megatron
from tests.tiny_models import DISTINCT, SQUARE, TinyShape, random_weights


@pytest.mark.parametrize("shape", [DISTINCT, SQUARE], ids=["distinct", "square"])
def test_logits_agree_with_megatron_core(tmp_path: Path, shape: TinyShape) -> None:
    weights = random_weights(shape, seed=2)
    config = HfReader(write_hf_mxfp4(tmp_path / "hf", shape, weights), CPU).config
    iteration = write_megatron(tmp_path / "mcore" / "iter_0000001", shape, weights)
    reader = MegatronReader(iteration, read(iteration).chunks, config, CPU)
    prompts = sequences(shape)
    ours = all_logits(reader, Prompts.of(prompts, CPU), Numerics())
    theirs = torch.cat(megatron_logits(iteration, config, prompts, CPU))
    assert theirs.std() > 1
    assert (ours - theirs).abs().max() < 5e-5


def test_the_oracle_names_a_weight_that_the_directory_lacks(tmp_path: Path) -> None:
    weights = random_weights(SQUARE, seed=2)
    config = HfReader(write_hf_mxfp4(tmp_path / "hf", SQUARE, weights), CPU).config
    iteration = write_megatron(
        tmp_path / "mcore" / "iter_0000001", SQUARE, weights, without="softmax_offset"
    )
    with pytest.raises(IntegrityError, match=r"megatron-core misses .*softmax_offset"):
        megatron_logits(iteration, config, [[1, 2]], CPU)
    assert not distributed.is_initialized()


def test_the_oracle_refuses_to_run_within_a_process_group(tmp_path: Path) -> None:
    weights = random_weights(SQUARE, seed=2)
    config = HfReader(write_hf_mxfp4(tmp_path / "hf", SQUARE, weights), CPU).config
    store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(UsageError, match="expects no process group, found one"):
            megatron_logits(tmp_path, config, [[1, 2]], CPU)
    finally:
        distributed.destroy_process_group()

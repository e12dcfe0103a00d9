"""torch_dist against megatron-core: it loads what we write, and we read what it saves."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from gptoss_convert.containers.torch_dist import read
from tests.megatron_cpu import (
    PARALLEL,
    Parallel,
    build_gpt_oss,
    cpu_megatron,
    load_directory,
    model_parallel,
    run_ranks,
    save_directory,
    single_process,
)
from tests.tiny_models import DISTINCT, SQUARE, TinyShape, megatron_tensors, random_weights
from tests.torch_dist_files import bytes_of, read_tensors, write_model

LOCAL_NORM = "decoder.layers.mlp.linear_fc1.layer_norm_weight"


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert bytes_of(found[name]) == bytes_of(tensor), name


def stacked_parameters(model: torch.nn.Module, shape: TinyShape) -> dict[str, Tensor]:
    """A model's parameters under their stacked names, by their names in the model alone."""
    own = {name: p.detach() for name, p in model.named_parameters()}
    stacked: dict[str, Tensor] = {}
    for name in own:
        if not name.startswith("decoder.layers.0."):
            if ".layers." not in name:
                stacked[name] = own[name]
            continue
        rest = name.removeprefix("decoder.layers.0.")
        layers = [f"decoder.layers.{n}.{rest}" for n in range(shape.layers)]
        key = rest.replace("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight")
        if ".local_experts." in rest:
            if ".local_experts.0." not in rest:
                continue
            key = key.replace(".local_experts.0.", ".experts.")
            experts = range(shape.experts)
            stacked[f"decoder.layers.{key}"] = torch.stack(
                [
                    torch.stack([own[n.replace("experts.0.", f"experts.{e}.")] for e in experts])
                    for n in layers
                ]
            )
        else:
            stacked[f"decoder.layers.{key}"] = torch.stack([own[n] for n in layers])
    return stacked


@pytest.mark.parametrize("shape", [DISTINCT, SQUARE], ids=["distinct", "square"])
def test_megatron_core_loads_what_we_write(tmp_path: Path, shape: TinyShape) -> None:
    tensors = megatron_tensors(shape, random_weights(shape, seed=3))
    write_model(tensors, tmp_path / "it")
    with single_process():
        model = build_gpt_oss(shape, torch.bfloat16)
        load_directory(model, tmp_path / "it")
        assert_same(stacked_parameters(model, shape), tensors)


@pytest.mark.parametrize("keys", ["te", "local"])
def test_every_chunk_that_megatron_core_saved_is_located(tmp_path: Path, keys: str) -> None:
    (tmp_path / "it").mkdir()
    with single_process():
        model = build_gpt_oss(DISTINCT, torch.float32, keys=keys)
        save_directory(model, tmp_path / "it")
        expected = stacked_parameters(model, DISTINCT)
    if keys == "local":
        expected[LOCAL_NORM] = expected.pop("decoder.layers.pre_mlp_layernorm.weight")
    assert_same(read_tensors(tmp_path / "it"), expected)
    found = read(tmp_path / "it")
    assert found.common == {"checkpoint_version": 3.0, "iteration": 1}
    assert found.skipped == {"extra_state": DISTINCT.layers * (2 + 2 * DISTINCT.experts)}
    assert found.saved_by == "megatron-core"


def test_a_missing_extra_state_fails_megatron_cores_default_strictness(tmp_path: Path) -> None:
    """Why all of them are written: the judge of the tests above does notice."""
    from torch.distributed.checkpoint.api import CheckpointException

    from gptoss_convert.containers.torch_dist import image
    from tests.torch_dist_files import native_specs, write_image

    tensors = megatron_tensors(SQUARE, random_weights(SQUARE, seed=3))
    plan = image(native_specs(tensors), {}, {}, files=1, max_file_bytes=1 << 30)
    write_image(plan, tensors, tmp_path / "it")
    with single_process():
        model = build_gpt_oss(SQUARE, torch.bfloat16)
        with pytest.raises(CheckpointException, match="_extra_state"):
            load_directory(model, tmp_path / "it")


def test_the_training_arguments_that_megatron_lm_saves_are_read(tmp_path: Path) -> None:
    tensors = megatron_tensors(SQUARE, random_weights(SQUARE, seed=3))
    write_model(tensors, tmp_path / "it")
    with cpu_megatron():
        from megatron.core.enums import ModelType
        from megatron.core.transformer.enums import AttnBackend

        args = argparse.Namespace(
            num_layers=4,
            attention_backend=AttnBackend.auto,
            model_type=ModelType.encoder_or_decoder,
            exit_signal=signal.SIGTERM,
            params_dtype=torch.bfloat16,
            load=Path("/a/b"),
            random=np.random.RandomState(1).get_state(),
            empty=(b"", bytearray(b"x"), {1}),
        )
    torch.save({"args": args, "iteration": 1}, tmp_path / "it" / "common.pt")
    found = read(tmp_path / "it").common["args"]
    assert isinstance(found, dict)
    assert found["attention_backend"] == "AttnBackend(5)"
    assert found["model_type"] == "ModelType(1)"
    assert found["exit_signal"] == f"Signals({signal.SIGTERM.value})"
    assert found["params_dtype"] == "torch.bfloat16"
    assert (found["num_layers"], found["load"]) == (4, "/a/b")


def pass_through_every_layout(source: Path, targets: Path) -> None:
    """Load into each parallel layout and save from it; runs in every rank."""
    for parallel in PARALLEL:
        with model_parallel(parallel):
            model = build_gpt_oss(SQUARE, torch.bfloat16)
            load_directory(model, source)
            save_directory(model, targets / parallel.label)


def cuts(path: Path, tensor: str) -> set[tuple[int, ...]]:
    return {chunk.extent for chunk in read(path).chunks if chunk.tensor.endswith(tensor)}


def test_every_parallel_layout_loads_what_we_write_and_saves_what_we_read(tmp_path: Path) -> None:
    tensors = megatron_tensors(SQUARE, random_weights(SQUARE, seed=4))
    source = write_model(tensors, tmp_path / "it", files=3)
    for parallel in PARALLEL:
        (tmp_path / parallel.label).mkdir()
    run_ranks(4, pass_through_every_layout, source, tmp_path)
    for parallel in PARALLEL:
        assert_same(read_tensors(tmp_path / parallel.label), tensors)
    h, f = SQUARE.hidden, SQUARE.inter
    both = Parallel(tp=2, ep=2, etp=2).label
    assert cuts(tmp_path / both, "linear_fc1.weight") == {(1, 1, f // 2, h)}
    assert cuts(tmp_path / both, "linear_fc2.weight") == {(1, 1, h, f // 2)}
    assert cuts(tmp_path / both, "word_embeddings.weight") == {(SQUARE.vocab // 2, h)}

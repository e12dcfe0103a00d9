"""Conversion to and from runs of several processes: megatron-core loads and saves, cut by TP, PP,
EP and ETP over gloo. Each rank's every parameter is held against the part cut by hand.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss_convert import Options, convert, inspect
from gptoss_convert.formats.checkpoint import Choices
from tests.megatron_cpu import PARALLEL, Parallel, build_gpt_oss, model_parallel, run_ranks
from tests.megatron_witness import (
    assert_parameters,
    assert_same,
    fill,
    gpt_model_parameters,
    load,
    loaded_by_transformers,
    part_of_rank,
    safetensors_in,
    save,
    training_entries,
)
from tests.tiny_files import write_hf_mxfp4
from tests.tiny_models import (
    DISTINCT,
    hf_bf16_tensors,
    openai_tensors,
    random_weights,
)

SHAPE = replace(
    replace(DISTINCT, layers=2, heads=18, kv_heads=6, experts=4, vocab=354),
    window=128,
    original_length=4096,
    beta_fast=32.0,
)
"""Axes that two ranks can share; window and YaRN as released, as args do not state all of them."""
TP, PP, EP, EXPERTS, MOST = PARALLEL
SAVES = {
    "stacked-tp": (TP, {}),
    "stacked-pp": (PP, {}),
    "stacked-ep": (EP, {}),
    "stacked-etp": (EXPERTS, {}),
    "stacked-most": (MOST, {}),
    "layers-most": (MOST, {"per_layer": True}),
    "experts-etp": (EXPERTS, {"per_layer": True, "per_expert": True}),
}
"""What is saved: by the ranks of which layout, under which naming."""


def load_and_save(folder: Path) -> None:
    """In every rank: load what was converted, compare, save what is converted back."""
    whole: dict[str, torch.Tensor] = torch.load(folder / "whole.pt")
    for parallel in PARALLEL:
        with model_parallel(parallel):
            model = build_gpt_oss(SHAPE, torch.bfloat16)
            expected = part_of_rank(SHAPE, parallel, whole)
            for per_layer in (False, True) if parallel in (EXPERTS, MOST) else (False,):
                layout = "per-layer" if per_layer else "stacked"
                load(model, folder / layout / "iter_0000001", per_layer=per_layer)
                assert_parameters(model, expected)
            fill(model, expected)
            for name, (saver, naming) in SAVES.items():
                if saver == parallel:
                    extra = {**training_entries(), "args": args_of(parallel)}
                    save(model, folder / name / "iter_0000001", **naming, extra=extra)


def args_of(parallel: Parallel) -> Namespace:
    """Megatron-LM's arguments of such a run, those that tell the model."""
    return Namespace(
        num_layers=SHAPE.layers,
        hidden_size=SHAPE.hidden,
        ffn_hidden_size=SHAPE.inter,
        moe_ffn_hidden_size=SHAPE.inter,
        num_attention_heads=SHAPE.heads,
        num_query_groups=SHAPE.kv_heads,
        kv_channels=SHAPE.head_dim,
        num_experts=SHAPE.experts,
        moe_router_topk=4,
        vocab_size=SHAPE.vocab,
        padded_vocab_size=SHAPE.vocab,
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        window_size=(127, 0),
        softmax_type="learnable",
        add_bias_linear=True,
        position_embedding_type="yarn",
        window_attn_skip_freq=2,
        normalization="RMSNorm",
        quick_geglu=True,
        glu_linear_offset=1.0,
        activation_func_clamp_value=7.0,
        untie_embeddings_and_output_weights=True,
        norm_epsilon=1e-5,
        rotary_base=150000,
        yarn_rotary_scaling_factor=32.0,
        yarn_original_max_position_embeddings=4096,
        yarn_beta_fast=32.0,
        yarn_beta_slow=1.0,
        yarn_mscale=1.0,
        yarn_mscale_all_dim=0.0,
        yarn_correction_range_round_to_int=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as published, as converted, and as the ranks of every layout saved it again."""
    folder = tmp_path_factory.mktemp("parallel")
    write_hf_mxfp4(folder / "published", SHAPE, random_weights(SHAPE, seed=5))
    for layout in ("stacked", "per-layer"):
        convert(folder / "published", folder / layout, Options(to="megatron", layout=layout))
    whole = gpt_model_parameters(SHAPE, loaded_by_transformers(folder / "published"))
    torch.save({name: tensor.clone() for name, tensor in whole.items()}, folder / "whole.pt")
    for name in SAVES:
        (folder / name / "iter_0000001").mkdir(parents=True)
    run_ranks(4, load_and_save, folder)
    return folder


@pytest.mark.parametrize("name", SAVES)
def test_every_layout_loads_the_conversion_and_what_it_saves_converts_back(
    tmp_path: Path, folder: Path, name: str
) -> None:
    weights = random_weights(SHAPE, seed=5)
    published = folder / "published"
    for options, expected in (
        (Options(to="hf", dtype="bf16"), hf_bf16_tensors(weights)),
        (Options(to="hf", dtype="mxfp4", scales=published), weights),
        (Options(to="openai", dtype="mxfp4", scales=published), openai_tensors(SHAPE, weights)),
    ):
        target = tmp_path / f"{options.to}-{options.dtype}"
        convert(folder / name, target, options)
        assert_same(safetensors_in(target), expected)


def test_inspect_tells_how_a_checkpoint_was_saved(folder: Path) -> None:
    found = {name: inspect(folder / name).summary() for name in SAVES}
    naming = {name: summary["variant"] for name, summary in found.items()}
    assert naming == {
        **dict.fromkeys([name for name in SAVES if name.startswith("stacked")], "stacked"),
        "layers-most": "per-layer",
        "experts-etp": "per-expert",
    }
    details: Mapping[str, Any] = found["stacked-most"]["details"]
    assert details["parallel"] == {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_model_parallel_size": 2,
        "expert_tensor_parallel_size": 1,
    }
    assert (details["iteration"], details["saved_by"]) == ("iter_0000001", "Megatron-LM")
    assert details["optimizer"] and details["skipped"]["optimizer"] == 1
    assert details["skipped"]["rng"] == 4
    assert any("skipped entries" in note for note in found["stacked-most"]["notes"])


def test_an_iteration_of_a_run_can_be_read_by_itself(folder: Path) -> None:
    assert (
        inspect(folder / "stacked-tp").summary()["parameters"]
        == (inspect(folder / "stacked-tp" / "iter_0000001", Choices()).summary()["parameters"])
    )

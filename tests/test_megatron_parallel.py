"""Conversion to and from runs of several processes: megatron-core loads and saves, cut by TP, PP,
EP and ETP over gloo. Each rank's every parameter is held against the part cut by hand.
"""

from __future__ import annotations

import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gptoss_convert import Options, convert, inspect
from gptoss_convert.containers import torch_dist
from gptoss_convert.errors import GptossError, InputError, IntegrityError, UsageError
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions
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
from tests.test_torch_dist import save_with_dcp
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
            save_legacy(model, parallel, folder / f"legacy-{parallel.label}")
            for name, (saver, naming) in SAVES.items():
                if saver == parallel:
                    extra = {**training_entries(), "args": args_of(parallel)}
                    save(model, folder / name / "iter_0000001", **naming, extra=extra)


def save_legacy(model: torch.nn.Module, parallel: Parallel, root: Path) -> None:
    """As Megatron-LM's `--ckpt-format torch` does since 2026-05-13: of each place that occurs, one
    rank's state dict; which of several equal ones does not matter."""
    from megatron.core import parallel_state

    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    if parallel.pp > 1:
        name += f"_{parallel_state.get_pipeline_model_parallel_rank():03d}"
    if parallel.ep > 1:
        name += f"_{parallel_state.get_expert_model_parallel_rank():03d}"
    place = root / "iter_0000001" / name
    place.mkdir(parents=True, exist_ok=True)
    state = {
        "args": args_of(parallel),
        "checkpoint_version": 3.0,
        "iteration": 1,
        "model": model.state_dict(),
        "optimizer": {"state": {0: torch.ones(3)}},
    }
    mine = place / f"rank{torch.distributed.get_rank()}.pt"
    torch.save(state, mine)
    mine.replace(place / "model_optim_rng.pt")


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


LEGACY = [f"legacy-{parallel.label}" for parallel in PARALLEL]


@pytest.mark.parametrize("name", LEGACY)
def test_the_legacy_format_of_every_layout_comes_back(
    tmp_path: Path, folder: Path, name: str
) -> None:
    convert(folder / name, tmp_path / "out", Options(to="hf", dtype="bf16"))
    assert_same(safetensors_in(tmp_path / "out"), hf_bf16_tensors(random_weights(SHAPE, seed=5)))
    summary = inspect(folder / name).summary()
    assert summary["variant"].startswith("module-")
    assert summary["details"]["skipped"]["optimizer"] == len(
        [*(folder / name / "iter_0000001").iterdir()]
    )


def legacy_copy(folder: Path, target: Path, name: str) -> Path:
    shutil.copytree(folder / name, target)
    return target / "iter_0000001"


def test_legacy_ranks_that_are_missing_are_named(tmp_path: Path, folder: Path) -> None:
    for number, (name, lost, words) in enumerate(
        (
            ("legacy-tp2", "mp_rank_01", "no folder of tensor-parallel rank 1 in stage 0"),
            ("legacy-ep2", "mp_rank_00_001", "no folder of expert-parallel rank 1 in stage 0"),
            ("legacy-pp2", "mp_rank_00_001", "no folder of tensor-parallel rank 0 in stage 1"),
        )
    ):
        iteration = legacy_copy(folder, tmp_path / f"{number}", name)
        shutil.rmtree(iteration / lost)
        with pytest.raises(IntegrityError, match=words):
            inspect(tmp_path / f"{number}")


def resave(file: Path, **changes: Any) -> None:
    """The same file with other values."""
    torch.save({**torch.load(file, weights_only=False), **changes}, file)


def test_a_legacy_rank_of_shifted_experts_is_seen_by_verify(tmp_path: Path, folder: Path) -> None:
    iteration = legacy_copy(folder, tmp_path / "shifted", "legacy-ep2")
    first, second = (iteration / f"mp_rank_00_00{n}" for n in (0, 1))
    first.rename(iteration / "other")
    second.rename(first)
    (iteration / "other").rename(second)
    asked = VerifyOptions(level="values", workers=1)
    assert not verify_checkpoints(folder / "stacked", tmp_path / "shifted", asked).same


def test_legacy_arguments_that_arrange_layers_otherwise_are_refused(
    tmp_path: Path, folder: Path
) -> None:
    iteration = legacy_copy(folder, tmp_path / "odd", "legacy-tp2")
    file = iteration / "mp_rank_00" / "model_optim_rng.pt"
    args = args_of(TP)
    for name, value, words in (
        ("decoder_first_pipeline_num_layers", 1, "decoder_first_pipeline_num_layers is 1: not"),
        ("expert_tensor_parallel_size", 4, "experts cut for 4 ranks"),
        ("virtual_pipeline_model_parallel_size", 2, r"1 models \(model0, \.\.\)"),
    ):
        resave(file, args=Namespace(**{**vars(args), name: value}))
        with pytest.raises(GptossError, match=words):
            inspect(tmp_path / "odd")
    resave(file, args=args, checkpoint_version=1.0)
    with pytest.raises(InputError, match=r"checkpoint_version 1\.0: before 2"):
        inspect(tmp_path / "odd")


def single(folder: Path) -> dict[str, torch.Tensor]:
    """The state dict of a single rank, as the ranks of one pipeline saved it in turn."""
    found: dict[str, torch.Tensor] = {}
    for stage in range(2):
        file = folder / "legacy-pp2" / "iter_0000001" / f"mp_rank_00_00{stage}"
        model = torch.load(file / "model_optim_rng.pt", weights_only=False)["model"]
        for name, tensor in model.items():
            if isinstance(tensor, torch.Tensor):
                found[name.replace("layers.0.", f"layers.{stage}.")] = tensor
    return found


def test_virtual_stages_are_put_in_order(tmp_path: Path, folder: Path) -> None:
    whole = single(folder)
    layers = [
        {n.replace("layers.1.", "layers.0."): t for n, t in whole.items() if f"layers.{i}." in n}
        for i in range(2)
    ]
    ends = {n: t for n, t in whole.items() if "layers." not in n}
    args = Namespace(**{**vars(args_of(Parallel())), "virtual_pipeline_model_parallel_size": 2})
    place = tmp_path / "virtual" / "iter_0000001" / "mp_rank_00"
    place.mkdir(parents=True)
    state = {"args": args, "checkpoint_version": 3.0, "iteration": 1}
    models = {"model0": {**ends, **layers[0]}, "model1": layers[1]}
    torch.save({**state, **models}, place / "model_optim_rng.pt")
    convert(tmp_path / "virtual", tmp_path / "out", Options(to="hf", dtype="bf16"))
    assert_same(safetensors_in(tmp_path / "out"), hf_bf16_tensors(random_weights(SHAPE, seed=5)))


NESTED = {"fsdp_dtensor": "module.", "torch_dcp": ""}


@pytest.mark.parametrize("form", NESTED)
def test_nested_state_dicts_of_megatron_are_read(tmp_path: Path, folder: Path, form: str) -> None:
    model = {NESTED[form] + name: tensor for name, tensor in single(folder).items()}
    state = {"model": model, "args": args_of(Parallel()), "iteration": 1}
    save_with_dcp(tmp_path / form / "iter_0000001", state)
    convert(tmp_path / form, tmp_path / "out", Options(to="hf", dtype="bf16"))
    assert_same(safetensors_in(tmp_path / "out"), hf_bf16_tensors(random_weights(SHAPE, seed=5)))


def test_biases_that_expert_ranks_overwrote_are_refused(tmp_path: Path, folder: Path) -> None:
    model = {
        f"module.{name}": tensor
        for name, tensor in single(folder).items()
        if not re.search(r"local_experts\.[23]\.linear_fc\d\.bias", name)
    }
    save_with_dcp(tmp_path / "lost" / "iter_0000001", {"model": model})
    with pytest.raises(InputError, match=r"8 experts' weights and 4 biases.*they are lost"):
        inspect(tmp_path / "lost")
    args = args_of(EP)
    model = {f"module.{name}": tensor for name, tensor in single(folder).items()}
    save_with_dcp(tmp_path / "several" / "iter_0000001", {"model": model, "args": args})
    with pytest.raises(InputError, match="expert_model_parallel_size is 2: in this form ranks"):
        inspect(tmp_path / "several")


def stored_tensors(source: Path) -> dict[str, torch.Tensor]:
    """The tensors of a torch_dist directory."""
    tensors: dict[str, torch.Tensor] = {}
    for chunk in torch_dist.read(source).chunks:
        whole = tensors.setdefault(chunk.tensor, torch.empty(chunk.shape, dtype=torch.bfloat16))
        raw = (source / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.nbytes]
        box = [slice(lo, lo + n) for lo, n in zip(chunk.start, chunk.extent, strict=True)]
        part = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16)
        whole[tuple(box)] = part.reshape(chunk.extent)
    return tensors


def renamed(source: Path, target: Path, rename: Callable[[str], str]) -> None:
    """A torch_dist directory with the same tensors under other names."""
    save_with_dcp(target, {rename(name): one for name, one in stored_tensors(source).items()})
    shutil.copy(source / "metadata.json", target)


def test_nemo_2_has_its_weights_under_module(tmp_path: Path, folder: Path) -> None:
    iteration = folder / "stacked" / "iter_0000001"
    renamed(iteration, tmp_path / "nemo" / "weights", lambda name: f"module.{name}")
    (tmp_path / "nemo" / "context").mkdir()
    config = folder / "published" / "config.json"
    with pytest.raises(InputError, match="--config"):
        inspect(tmp_path / "nemo")
    convert(tmp_path / "nemo", tmp_path / "out", Options(to="hf", dtype="bf16", config=config))
    assert_same(safetensors_in(tmp_path / "out"), hf_bf16_tensors(random_weights(SHAPE, seed=5)))


def paired(name: str) -> str:
    """A HybridModel's name: attention and experts are layers of their own."""
    layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if layer is None:
        return name.replace("final_layernorm", "final_norm")
    half = 0 if layer[2].startswith("self_attention") else 1
    return f"decoder.layers.{2 * int(layer[1]) + half}.{layer[2]}"


def test_a_hybrid_models_layers_are_pairs(tmp_path: Path, folder: Path) -> None:
    iteration = folder / "per-layer" / "iter_0000001"
    renamed(iteration, tmp_path / "hybrid" / "iter_0000001", paired)
    args = {**vars(args_of(Parallel())), "num_layers": 4, "hybrid_layer_pattern": "*E*E"}
    torch.save({"args": Namespace(**args)}, tmp_path / "hybrid" / "iter_0000001" / "common.pt")
    convert(tmp_path / "hybrid", tmp_path / "out", Options(to="hf", dtype="bf16"))
    assert_same(safetensors_in(tmp_path / "out"), hf_bf16_tensors(random_weights(SHAPE, seed=5)))
    args["hybrid_layer_pattern"] = "*EE*"
    torch.save({"args": Namespace(**args)}, tmp_path / "hybrid" / "iter_0000001" / "common.pt")
    with pytest.raises(InputError, match=r"hybrid_layer_pattern is '\*EE\*'"):
        inspect(tmp_path / "hybrid")


def test_main_parameters_stand_in_for_the_weights(tmp_path: Path, folder: Path) -> None:
    iteration = folder / "stacked" / "iter_0000001"
    with pytest.raises(UsageError, match="--from-main-params: no float32 parameters"):
        inspect(folder / "stacked", Choices(from_main_params=True))
    tensors = stored_tensors(iteration)
    # Less than half a step of BF16 apart: they round to the weights, which are zero here.
    main = {
        f"optimizer.state.fp32_param.{name}": one.float() * (1 + 2**-12)
        for name, one in tensors.items()
    }
    source = tmp_path / "main" / "iter_0000001"
    save_with_dcp(source, {**{n: torch.zeros_like(t) for n, t in tensors.items()}, **main})
    for name in ("metadata.json", "common.pt"):
        shutil.copy(iteration / name, source)
    config = folder / "published" / "config.json"
    options = Options(
        to="hf", dtype="bf16", config=config, from_main_params=True, cast=True, keep_scales=False
    )
    convert(tmp_path / "main", tmp_path / "out", options)
    assert_same(safetensors_in(tmp_path / "out"), hf_bf16_tensors(random_weights(SHAPE, seed=5)))

"""What a Megatron checkpoint says of itself: fields, vocabulary, iterations; what is refused."""

from __future__ import annotations

import enum
import json
import re
import shutil
import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from torch import Tensor
from torch.distributed.checkpoint import filesystem, state_dict_saver
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

from gptoss_convert import Options, convert, inspect, plan
from gptoss_convert.cli.main import cli
from gptoss_convert.errors import GptossError, InputError, IntegrityError, UsageError
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.formats.megatron.stated import of_args
from tests.megatron_witness import assert_same, finish, safetensors_in, write_cut
from tests.tiny_files import write_hf_bf16, write_hf_mxfp4
from tests.tiny_models import SQUARE, hf_bf16_tensors, megatron_tensors, random_weights

SHAPE = replace(SQUARE, layers=2, window=128, original_length=4096, beta_fast=32.0)
"""Window and YaRN as released."""
WEIGHTS = random_weights(SHAPE, seed=2)
TENSORS = megatron_tensors(SHAPE, WEIGHTS)
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
SINKS = "decoder.layers.self_attention.core_attention.softmax_offset"
TO_BF16 = Options(to="hf", dtype="bf16")

ARGS: dict[str, Any] = {
    "num_layers": SHAPE.layers,
    "hidden_size": SHAPE.hidden,
    "ffn_hidden_size": SHAPE.inter,
    "moe_ffn_hidden_size": None,
    "num_attention_heads": SHAPE.heads,
    "num_query_groups": SHAPE.kv_heads,
    "group_query_attention": True,
    "kv_channels": SHAPE.head_dim,
    "num_experts": SHAPE.experts,
    "moe_router_topk": 4,
    "moe_router_pre_softmax": False,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-05,
    "position_embedding_type": "yarn",
    "rotary_base": 150000,
    "rotary_percent": 1.0,
    "rotary_scaling_factor": 32.0,
    "mscale": 1.0,
    "mscale_all_dim": 0.0,
    "yarn_original_max_position_embeddings": 4096,
    "yarn_beta_fast": None,
    "yarn_beta_slow": None,
    "yarn_correction_range_round_to_int": False,
    "window_size": (127, 0),
    "window_attn_skip_freq": [1, 0],
    "softmax_type": "learnable",
    "quick_geglu": True,
    "swiglu": False,
    "glu_linear_offset": 1.0,
    "activation_func_clamp_value": 7.0,
    "add_bias_linear": True,
    "untie_embeddings_and_output_weights": True,
    "vocab_size": SHAPE.vocab,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 1,
    "expert_model_parallel_size": 4,
    "expert_tensor_parallel_size": None,
}
"""Megatron-LM's arguments of a run with core 0.19, by hand."""


class Scope(enum.Enum):
    """A class that only the trainer knows."""

    LAYER = "layer"


def written(
    root: Path, tensors: dict[str, Tensor] | None = None, iteration: int = 1, **args: Any
) -> Path:
    """A checkpoint as Megatron-LM leaves it: no Hugging Face files, `args` with changes."""
    folder = root / f"iter_{iteration:07d}"
    return write_cut(folder, tensors or TENSORS, {"args": Namespace(**{**ARGS, **args})}, seed=9)


def padded(rows: int) -> dict[str, Tensor]:
    """The tensors with `rows` more rows of vocabulary."""
    more = {
        name: torch.cat((TENSORS[name], TENSORS[name][:rows] * 0)) for name in (EMBEDDING, OUTPUT)
    }
    return {**TENSORS, **more}


def assert_converts(root: Path, options: Options = TO_BF16) -> tuple[str, ...]:
    """The checkpoint converts to the model of this file; the notes are returned."""
    target = root.parent / "target"
    report = convert(root, target, options)
    assert_same(safetensors_in(target), hf_bf16_tensors(WEIGHTS))
    return report.conversion.notes


def refusal(root: Path, options: Options = TO_BF16) -> GptossError:
    with pytest.raises(GptossError) as caught:
        plan(root, root.parent / "target", options)
    return caught.value


def test_args_tell_the_configuration(tmp_path: Path) -> None:
    assert_converts(written(tmp_path / "m"))
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["sliding_window"] == 128
    assert config["rope_scaling"]["original_max_position_embeddings"] == 4096


def run_config(**changes: Any) -> str:
    """run_config.yaml as Megatron-Bridge writes it, by hand."""
    names = {"num_experts": "num_moe_experts", "norm_epsilon": "layernorm_epsilon"}
    others = ("quick_geglu", "untie", "group_query", "rotary_scaling", "mscale")
    kept = {k: v for k, v in ARGS.items() if v is not None and not k.startswith(others)}
    model = {names.get(key, key): value for key, value in kept.items()}
    model |= {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        "window_size": [127, 0],
        "window_attn_skip_freq": 2,
        "gated_linear_unit": True,
        "activation_func": {
            "_target_": "megatron.core.fusions.fused_bias_geglu.quick_gelu",
            "_call_": False,
        },
        "share_embeddings_and_output_weights": False,
        # A field of another attention, which this model never reads.
        "rotary_scaling_factor": None,
        "yarn_rotary_scaling_factor": 32.0,
        "yarn_beta_fast": 32.0,
        "yarn_beta_slow": 1.0,
    }
    return yaml.safe_dump({"model": {**model, **changes}})


def test_run_config_tells_the_configuration(tmp_path: Path) -> None:
    root = write_cut(tmp_path / "m" / "iter_0000001", TENSORS)
    (root / "iter_0000001" / "run_config.yaml").write_text(run_config())
    assert_converts(root)
    assert inspect(root).summary()["details"]["saved_by"] == "Megatron-Bridge"


def test_without_any_configuration_it_is_asked_for(tmp_path: Path) -> None:
    root = write_cut(tmp_path / "m" / "iter_0000001", TENSORS)
    assert "pass --config CONFIG_JSON" in str(refusal(root))
    source = write_hf_mxfp4(tmp_path / "hf", SHAPE, WEIGHTS)
    assert_converts(root, replace(TO_BF16, config=source / "config.json"))


NOT_GPT_OSS = [
    ("window_attn_skip_freq", [0, 1], "2"),
    ("window_attn_skip_freq", None, "2"),
    ("mscale", 0.707, "None"),
    ("mscale_all_dim", 1.0, "None"),
    ("add_bias_linear", False, "True"),
    ("softmax_type", "vanilla", "'learnable'"),
    ("softmax_scale", 0.25, "None"),
    ("glu_linear_offset", 0.0, "1.0"),
    ("quick_geglu", False, "True"),
    ("swiglu", True, "False"),
    ("position_embedding_type", "rope", "'yarn'"),
    ("no_rope_freq", 2, "None"),
    ("use_rope_scaling", True, "False"),
    ("rotary_seq_len_interpolation_factor", 4, "None"),
    ("moe_router_pre_softmax", True, "False"),
    ("moe_router_topk_scaling_factor", 2.5, "None"),
    ("moe_router_num_groups", 2, "None"),
    ("moe_router_group_topk", 1, "None"),
    ("moe_router_load_balancing_type", "sinkhorn", "'none'"),
    ("apply_layernorm_1p", True, "False"),
    ("untie_embeddings_and_output_weights", False, "True"),
    ("normalization", "LayerNorm", "'RMSNorm'"),
]


@pytest.mark.parametrize(("field", "found", "expected"), NOT_GPT_OSS)
def test_a_field_that_makes_another_model_is_named_with_both_values(
    tmp_path: Path, field: str, found: Any, expected: str
) -> None:
    error = refusal(written(tmp_path / "m", **{field: found}))
    assert type(error) is InputError
    assert error.exit_code == 3
    assert re.search(
        rf"args: {field} is {re.escape(repr(found))}[^;]*, GPT-OSS here has {expected};",
        str(error),
    )
    assert "\n" not in str(error)


NEUTRAL = {
    "moe_router_topk_scaling_factor": 1.0,
    "no_rope_freq": [0, 0],
    "moe_layer_freq": [1, 1],
    "softmax_scale": SHAPE.head_dim**-0.5,
    "mscale": None,
    "moe_router_load_balancing_type": ["aux_loss"],
    "mtp_num_layers": 0,
    "rope_scaling_factor": 8.0,
    "hidden_dropout": 0.1,
}


@pytest.mark.parametrize("field", NEUTRAL)
def test_a_field_at_a_neutral_value_is_no_contradiction(tmp_path: Path, field: str) -> None:
    assert_converts(written(tmp_path / "m", **{field: NEUTRAL[field]}))


TAKEN = [
    ("yarn_correction_range_round_to_int", True, "rope_truncate", True),
    ("yarn_correction_range_round_to_int", None, "rope_truncate", True),
    ("window_size", (63, 0), "sliding_window", 64),
    ("rotary_base", 10000, "rope_theta", 10000),
    ("rotary_scaling_factor", 16, "rope_factor", 16),
    ("rotary_scaling_factor", None, "rope_factor", 1),
    ("yarn_original_max_position_embeddings", 8192, "original_max_position_embeddings", 8192),
    ("yarn_beta_fast", 64.0, "beta_fast", 64),
    ("yarn_beta_slow", 2, "beta_slow", 2),
    ("norm_epsilon", 1e-6, "rms_norm_eps", 1e-6),
    ("activation_func_clamp_value", 6.5, "swiglu_limit", 6.5),
    ("moe_router_topk", 2, "num_experts_per_tok", 2),
]


@pytest.mark.parametrize(("field", "stated", "number", "expected"), TAKEN)
def test_a_number_that_is_stated_is_taken(
    tmp_path: Path, field: str, stated: Any, number: str, expected: float
) -> None:
    source = plan(written(tmp_path / "m", **{field: stated}), tmp_path / "t", TO_BF16).source
    assert getattr(source.config, number) == expected
    noted = [note for note in source.notes if note.startswith(f"{number} is ")]
    assert len(noted) == (number != "sliding_window")
    context = source.config.original_max_position_embeddings * source.config.rope_factor
    assert source.config.max_position_embeddings == context


@pytest.mark.parametrize(
    ("field", "stated", "message"),
    [
        ("window_size", None, "window_size is None, expects [tokens before, 0]"),
        ("window_size", (127, -1), "window_size is (127, -1), expects [tokens before, 0]"),
        (
            "window_size",
            (128, 0),
            "window_size is (128, 0), a window of 129 tokens, as Megatron-Br",
        ),
        (
            "yarn_original_max_position_embeddings",
            131072,
            "yarn_original_max_position_embeddings is 131072, as Megatron-LM's --enable-gpt-oss",
        ),
        (
            "enable_gpt_oss",
            True,
            "(of enable_gpt_oss) is 131072, as Megatron-LM's --enable-gpt-oss",
        ),
        (
            "activation_func_clamp_value",
            None,
            "activation_func_clamp_value is None, expects a numb",
        ),
        ("moe_router_topk", 9, f"moe_router_topk is 9, of {SHAPE.experts} experts"),
        ("moe_router_topk", "4", "moe_router_topk is '4', expects a whole number above 0"),
        ("num_layers", True, "num_layers is True, expects a whole number"),
        ("hidden_size", -1, "hidden_size is -1, expects a whole number above 0"),
        ("rotary_base", float("nan"), "rotary_base is nan, expects a number above 0"),
        ("window_size", Scope.LAYER, f"window_size is '{__name__}.Scope'"),
        (
            "softmax_type",
            Scope.LAYER,
            "softmax_type is 'tests.test_megatron.Scope', an object, exp",
        ),
    ],
)
def test_a_number_that_no_model_can_have_is_named(
    tmp_path: Path, field: str, stated: Any, message: str
) -> None:
    error = refusal(written(tmp_path / "m", **{field: stated}))
    assert type(error) is InputError
    assert message in str(error)


def test_what_args_do_not_state_is_asked_for(tmp_path: Path) -> None:
    """Megatron-LM before core 0.19 keeps YaRN's numbers out of its arguments."""
    older = {name: stated for name, stated in ARGS.items() if not name.startswith("yarn_")}
    root = write_cut(tmp_path / "m" / "iter_0000001", TENSORS, {"args": Namespace(**older)})
    error = str(refusal(root))
    assert "args: states no yarn_rotary_scaling_factor, yarn_original_max_position_" in error
    assert error.endswith("; pass --config CONFIG_JSON")
    assert "rotary_scaling_factor is 32" not in error


@pytest.mark.parametrize(
    ("field", "found"),
    [
        ("activation_func", {"_call_": False, "_target_": "torch.nn.functional.silu"}),
        ("layernorm_zero_centered_gamma", True),
        ("share_embeddings_and_output_weights", True),
        ("window_size", [128, 0]),
    ],
)
def test_a_field_of_run_config_that_makes_another_model_is_named(
    tmp_path: Path, field: str, found: object
) -> None:
    root = write_cut(tmp_path / "m" / "iter_0000001", TENSORS)
    (root / "iter_0000001" / "run_config.yaml").write_text(run_config(**{field: found}))
    assert f"run_config.yaml: {field} is {found!r}" in str(refusal(root))


def test_none_of_a_size_follows_from_the_others(tmp_path: Path) -> None:
    """As in `__post_init__`: every head its own kv head, heads that fill the hidden size."""
    derived = {"kv_channels": None, "num_query_groups": None, "ffn_hidden_size": None}
    stated = of_args("args", {**ARGS, **derived, "group_query_attention": False})
    sizes = [stated.fields[name] for name in ("kv_channels", "num_query_groups")]
    assert sizes == [SHAPE.hidden // SHAPE.heads, SHAPE.heads]
    assert stated.fields["moe_ffn_hidden_size"] == 4 * SHAPE.hidden


def test_all_contradictions_are_named_at_once_and_a_given_config_overrules_them(
    tmp_path: Path,
) -> None:
    root = written(tmp_path / "m", window_size=(128, 0), softmax_type="vanilla")
    error = str(refusal(root))
    assert "window_size is (128, 0)" in error and "softmax_type is 'vanilla'" in error
    source = write_hf_mxfp4(tmp_path / "hf", SHAPE, WEIGHTS)
    notes = assert_converts(root, replace(TO_BF16, config=source / "config.json"))
    assert any("window_size is (128, 0)" in note and "going by" in note for note in notes)


def test_fields_are_held_against_the_carried_configuration(tmp_path: Path) -> None:
    write_hf_bf16(tmp_path / "hf", SHAPE, hf_bf16_tensors(WEIGHTS))
    convert(tmp_path / "hf", tmp_path / "m", Options(to="megatron"))
    state = {"args": Namespace(**{**ARGS, "window_size": (128, 0)})}
    torch.save(state, tmp_path / "m" / "iter_0000001" / "common.pt")
    assert "args: window_size is (128, 0), GPT-OSS here has [127, 0]" in str(
        refusal(tmp_path / "m")
    )


@pytest.mark.parametrize("rows", [2, 128])
def test_padding_of_the_vocabulary_is_cut_and_counted(tmp_path: Path, rows: int) -> None:
    notes = assert_converts(written(tmp_path / "m", padded(rows)))
    assert f"vocabulary: {rows} rows of padding cut off" in notes


def test_a_vocabulary_of_unknown_size_is_asked_for(tmp_path: Path) -> None:
    root = written(tmp_path / "m", padded(128), vocab_size=None)
    error = refusal(root)
    assert type(error) is UsageError
    assert f"{SHAPE.vocab + 128} rows may hold padding; pass --vocab-size" in str(error)
    notes = assert_converts(root, replace(TO_BF16, vocab_size=SHAPE.vocab))
    assert "vocabulary: 128 rows of padding cut off" in notes


def test_a_vocabulary_that_is_no_multiple_of_128_has_no_padding(tmp_path: Path) -> None:
    tensors = {**TENSORS, EMBEDDING: TENSORS[EMBEDDING][:250], OUTPUT: TENSORS[OUTPUT][:250]}
    root = written(tmp_path / "m", tensors, vocab_size=None)
    assert plan(root, tmp_path / "t", TO_BF16).source.config.vocab_size == 250


@pytest.mark.parametrize(
    ("stated", "asked", "message"),
    [
        (None, 257, "vocab_size 257, the checkpoint holds 256 rows"),
        (300, None, "vocab_size 300, the checkpoint holds 256 rows"),
        (0, None, "vocab_size 0, the checkpoint holds 256 rows"),
        ("256", None, "vocab_size '256', the checkpoint holds 256 rows"),
    ],
)
def test_a_wrong_vocabulary_size_is_refused(
    tmp_path: Path, stated: object, asked: int | None, message: str
) -> None:
    root = written(tmp_path / "m", vocab_size=stated)
    error = refusal(root, replace(TO_BF16, vocab_size=asked))
    assert message in str(error)


def test_a_vocabulary_size_besides_a_configuration_must_agree(tmp_path: Path) -> None:
    source = write_hf_mxfp4(tmp_path / "hf", SHAPE, WEIGHTS)
    options = replace(TO_BF16, config=source / "config.json", vocab_size=200)
    error = refusal(written(tmp_path / "m"), options)
    assert type(error) is UsageError
    assert "vocab_size is 256, --vocab-size is 200" in str(error)


def test_the_tracker_chooses_the_iteration_unless_asked(tmp_path: Path) -> None:
    root = tmp_path / "m"
    written(root, {**TENSORS, SINKS: TENSORS[SINKS] + 1}, iteration=7)
    written(root, iteration=3)
    assert inspect(root).checkpoint.root.name == "iter_0000003"
    assert inspect(root, Choices(iteration=7)).checkpoint.root.name == "iter_0000007"
    assert_converts(root)
    assert "no iteration 5; choose --iteration 3 or 7" in str(
        refusal(root, replace(TO_BF16, iteration=5))
    )
    (root / "latest_checkpointed_iteration.txt").write_text("9\n")
    error = refusal(root)
    assert "names iter_0000009, which is missing; choose --iteration 3 or 7" in str(error)
    assert error.exit_code == 2


def test_the_common_state_of_core_0_19_is_read(tmp_path: Path) -> None:
    """An object in the .distcp files instead of common.pt, two fields in metadata.json."""
    iteration = tmp_path / "m" / "iter_0000001"
    iteration.mkdir(parents=True)
    state = {"args": Namespace(**ARGS), "iteration": 1, "checkpoint_version": 3.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state_dict_saver.save(
            {**TENSORS, "common_state/shard_0_1": [state]},
            storage_writer=filesystem.FileSystemWriter(iteration),
            planner=DefaultSavePlanner(flatten_state_dict=False),
            no_dist=True,
        )
    finish(iteration, {})
    (iteration / "common.pt").unlink()
    declared = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(declared))
    assert_converts(tmp_path / "m")


def test_float32_sinks_need_the_option_to_round(tmp_path: Path) -> None:
    """Transformer Engine creates them so; here their values are BF16's."""
    root = written(tmp_path / "m", {**TENSORS, SINKS: TENSORS[SINKS].float()})
    error = refusal(root)
    assert f"{SINKS}: expects dtype BF16, found F32; pass --cast" in str(error)
    assert error.exit_code == 3
    assert_converts(root, replace(TO_BF16, cast=True))


@pytest.mark.parametrize(
    "lost", ["decoder.layers.mlp.experts.experts.linear_fc2.bias", "output_layer.weight", SINKS]
)
def test_a_missing_tensor_is_named(tmp_path: Path, lost: str) -> None:
    tensors = {name: tensor for name, tensor in TENSORS.items() if name != lost}
    error = refusal(written(tmp_path / "m", tensors))
    assert type(error) is IntegrityError
    assert error.exit_code == 4
    assert str(error).endswith(f"1 tensors missing: {lost}")


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.self_attention.q_layernorm.weight",
        "decoder.layers.mlp.shared_experts.linear_fc1.weight",
        "decoder.layers.mlp.router.expert_bias",
        "vision_model.weight",
    ],
)
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    error = refusal(written(tmp_path / "m", {**TENSORS, name: torch.ones(2, 4).bfloat16()}))
    assert type(error) is IntegrityError
    assert error.exit_code == 4
    assert f"1 unknown tensors: {name}" in str(error)


def legacy(iteration: Path) -> None:
    shutil.rmtree(iteration)
    (iteration / "mp_rank_00").mkdir(parents=True)
    torch.save({"checkpoint_version": 3.0}, iteration / "mp_rank_00" / "model_optim_rng.pt")


def zarr(iteration: Path) -> None:
    backend = {"sharded_backend": "zarr", "sharded_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(backend))


def fsdp(iteration: Path) -> None:
    shutil.rmtree(iteration)
    write_cut(iteration, {"model.module.norm.weight": TENSORS[OUTPUT]})
    (iteration / "metadata.json").unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (legacy, "no args, which say how ranks shared the model"),
        (zarr, "format 'zarr'; supported: torch_dist"),
        (fsdp, "a state dict as torch nests it, of no model of Megatron"),
    ],
    ids=["legacy", "zarr", "fsdp"],
)
def test_other_formats_of_megatron_are_named(
    tmp_path: Path, change: Callable[[Path], None], message: str
) -> None:
    root = written(tmp_path / "m")
    change(root / "iter_0000001")
    error = refusal(root)
    assert message in str(error)
    assert error.exit_code == 3


def inspected(root: Path, *options: str) -> str:
    done = CliRunner().invoke(cli, ["inspect", str(root), *options], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_inspect_says_what_a_megatron_checkpoint_is(tmp_path: Path) -> None:
    root = written(tmp_path / "m", padded(2))
    shown = dict(line.split("  ", 1) for line in inspected(root).splitlines() if "  " in line)
    found = {key.strip(): value.strip() for key, value in shown.items()}
    assert found["format"] == "megatron (stacked)"
    assert found["iteration"] == "iter_0000001, saved by Megatron-LM"
    assert found["configuration"] == f"{root / 'iter_0000001'}: args"
    assert found["saved with"] == "TP 2, PP 1, EP 4"
    assert found["optimizer"] == "none"
    assert found["widths"].endswith(", vocabulary 256")
    details = json.loads(inspected(root, "--json"))["details"]
    assert details["naming"] == "stacked"
    assert details["parallel"]["expert_model_parallel_size"] == 4
    assert "expert_tensor_parallel_size" not in details["parallel"]
    assert details["chunks"] > len(TENSORS)

"""Launch help: every number is the checkpoint's own, and megatron-core has the fields."""

from __future__ import annotations

import ast
import json
import shlex
from dataclasses import fields, replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from gptoss_convert import Options, convert
from gptoss_convert.check.check import check
from gptoss_convert.cli.main import cli
from gptoss_convert.conversion.manifest import NAME
from gptoss_convert.errors import UsageError
from gptoss_convert.formats.megatron.launch import LAUNCH
from tests.test_docs import blocks_of
from tests.tiny_files import write_hf_mxfp4
from tests.tiny_models import DISTINCT, random_weights

ODD = replace(DISTINCT, layers=2, window=23, original_length=96, rope_factor=7.0, rope_theta=12345)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("launch")
    write_hf_mxfp4(root / "hf", ODD, random_weights(ODD, seed=1))
    convert(root / "hf", root / "megatron", Options(to="megatron"))
    return root


def parsed(words: list[str]) -> dict[str, object]:
    """The arguments by name; those without a value are True."""
    found: dict[str, object] = {}
    for word, following in zip(words, [*words[1:], "--"], strict=True):
        if word.startswith("--"):
            assert word not in found
            found[word] = True if following.startswith("--") else following
    return found


def stored(folder: Path) -> dict[str, object]:
    shell = next(b for b in blocks_of(folder / "megatron" / LAUNCH) if b.language == "sh")
    inside = shell.text.partition("ARGS=(")[2].rpartition(")")[0]
    return parsed(shlex.split(inside.replace("\\\n", " ")))


EXPECTED = {
    "--num-layers": ODD.layers,
    "--hidden-size": ODD.hidden,
    "--ffn-hidden-size": ODD.inter,
    "--moe-ffn-hidden-size": ODD.inter,
    "--num-attention-heads": ODD.heads,
    "--num-query-groups": ODD.kv_heads,
    "--kv-channels": ODD.head_dim,
    "--num-experts": ODD.experts,
    "--moe-router-topk": 4,
    "--max-position-embeddings": 96 * 7,
    "--seq-length": 96,
    "--rotary-base": 12345,
    "--rotary-scaling-factor": 7.0,
    "--yarn-original-max-position-embeddings": 96,
    "--yarn-beta-fast": ODD.beta_fast,
    "--yarn-beta-slow": 1.0,
    "--norm-epsilon": 1e-5,
    "--glu-linear-offset": 1.0,
    "--activation-func-clamp-value": 7.0,
    "--window-attn-skip-freq": 2,
    "--expert-tensor-parallel-size": 1,
}


def test_every_number_is_that_of_the_checkpoint(folder: Path) -> None:
    found = stored(folder)
    assert {name: float(str(found[name])) for name in EXPECTED} == EXPECTED
    # A window of 23 tokens: itself and 22 before.
    assert found["--window-size"] == "22,0"
    assert found["--softmax-type"] == "learnable"
    assert found["--position-embedding-type"] == "yarn"
    flags = {name for name, value in found.items() if value is True}
    assert flags == {
        *("--use-checkpoint-args", "--bf16", "--group-query-attention", "--add-qkv-bias"),
        *("--untie-embeddings-and-output-weights", "--moe-grouped-gemm", "--quick-geglu"),
        *("--no-yarn-correction-range-round-to-int", "--no-rope-fusion"),
        "--no-bias-dropout-fusion",
    }
    assert "--disable-bias-linear" not in found


RENAMED = {
    "num_experts": "num_moe_experts",
    "norm_epsilon": "layernorm_epsilon",
}
NOT_OF_THE_MODEL = frozenset(
    (
        *("load", "ckpt_format", "use_checkpoint_args", "tokenizer_type", "tokenizer_model"),
        *("transformer_impl", "seq_length", "max_position_embeddings"),
        *("group_query_attention", "untie_embeddings_and_output_weights", "quick_geglu"),
        *("position_embedding_type", "rotary_base", "rotary_percent", "rotary_scaling_factor"),
        *("no_rope_fusion", "no_bias_dropout_fusion"),
        *("yarn_original_max_position_embeddings", "yarn_beta_fast", "yarn_beta_slow"),
        "no_yarn_correction_range_round_to_int",
    )
)
"""Arguments of Megatron-LM's scripts, or that reach the model by another way than its config."""


@pytest.mark.filterwarnings("ignore")
def test_megatron_core_has_a_field_for_every_argument_of_the_model(folder: Path) -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    known = {field.name for field in fields(TransformerConfig)}
    names = {name.removeprefix("--").replace("-", "_") for name in stored(folder)}
    assert names >= NOT_OF_THE_MODEL
    asked = {RENAMED.get(name, name) for name in names - NOT_OF_THE_MODEL}
    assert asked - known == set()


def test_convert_prints_what_it_stores(folder: Path) -> None:
    words = ["convert", str(folder / "hf"), str(folder / "again"), "--to", "megatron"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    printed = done.stdout.partition(f"{LAUNCH}:\n")[2]
    assert all(len(line) <= 100 for line in printed.splitlines())
    assert parsed(shlex.split(printed)) == stored(folder)


def test_the_page_is_in_the_manifest_and_inspect_prints_it(folder: Path) -> None:
    target = folder / "megatron"
    assert LAUNCH in json.loads((target / NAME).read_text())["files"]
    assert not check(target).problems
    done = CliRunner().invoke(cli, ["inspect", str(target), "--launch"])
    assert done.exit_code == 0, done.output
    page = (target / LAUNCH).read_text(encoding="utf-8")
    sentence = "`run_config.yaml` here is for 0.4.0 or later (`--bridge modern`, the default).\n"
    assert page.replace(sentence, "") == done.stdout.removesuffix("\n")


def test_the_snippet_for_bridge_is_python(folder: Path) -> None:
    (snippet,) = (b for b in blocks_of(folder / "megatron" / LAUNCH) if b.language == "python")
    ast.parse(snippet.text)


def test_other_formats_have_no_launch_page(folder: Path) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(folder / "hf"), "--launch"])
    assert isinstance(done.exception, UsageError)
    assert "--launch is for Megatron" in str(done.exception)

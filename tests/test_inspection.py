"""What `inspect` tells of a directory, and what it calls by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gptoss_convert import Options, convert, inspect
from gptoss_convert.errors import GptossError
from tests.tiny_files import hf_config, write_hf_bf16, write_hf_mxfp4, write_openai
from tests.tiny_models import DISTINCT, random_weights

WEIGHTS = random_weights(DISTINCT, seed=11)


@pytest.fixture
def mxfp4(tmp_path: Path) -> Path:
    return write_hf_mxfp4(tmp_path / "mxfp4", DISTINCT, WEIGHTS)


def parameters() -> int:
    """Elements of the model, counted from its BF16 form by hand."""
    s = DISTINCT
    q, kv = s.heads * s.head_dim, s.kv_heads * s.head_dim
    attention = (q + 2 * kv) * (s.hidden + 1) + s.heads + s.hidden * (q + 1)
    experts = s.experts * (2 * s.inter * (s.hidden + 1) + s.hidden * (s.inter + 1))
    layer = attention + experts + s.experts * (s.hidden + 1) + 2 * s.hidden
    return s.layers * layer + 2 * s.vocab * s.hidden + s.hidden


def test_formats_are_told_apart_and_counted(mxfp4: Path, tmp_path: Path):
    bf16 = write_hf_bf16(tmp_path / "bf16", DISTINCT, WEIGHTS)
    openai = write_openai(tmp_path / "original", DISTINCT, WEIGHTS)
    for folder, label, encoding, tensors in (
        (mxfp4, "hf-mxfp4", "mxfp4", 3 + 19 * 4),
        (bf16, "hf-bf16", "bf16", 3 + 17 * 4),
        (openai, "openai", "mxfp4", 3 + 15 * 4),
    ):
        summary = inspect(folder).summary()
        assert (summary["format"], summary["encoding"]) == (label, encoding)
        assert (summary["tensors"], summary["parameters"]) == (tensors, parameters())
        sizes = {p.name: p.stat().st_size for p in folder.glob("*.safetensors")}
        assert summary["files"] == sizes
        assert sum(summary["dtypes"].values()) == tensors
        assert summary["config"]["num_hidden_layers"] == DISTINCT.layers
        assert json.loads(json.dumps(summary)) == summary


def test_sidecar_and_carried_files_are_told(mxfp4: Path, tmp_path: Path):
    (mxfp4 / "tokenizer.json").write_text("{}")
    convert(mxfp4, tmp_path / "out", Options(to="hf", dtype="bf16"))
    summary = inspect(tmp_path / "out").summary()
    assert summary["scales_sidecar"] is True
    assert summary["carried_files"] == ["tokenizer.json"]
    assert inspect(mxfp4).summary()["scales_sidecar"] is False


def test_a_contradiction_between_config_and_experts_is_noted(mxfp4: Path):
    (mxfp4 / "config.json").write_text(json.dumps(hf_config(DISTINCT, mxfp4=False)))
    (note,) = inspect(mxfp4).summary()["notes"]
    assert "has no quantization_config, the experts are MXFP4" in note


@pytest.mark.parametrize(
    ("name", "content", "status", "message"),
    [
        (
            "model-00001-of-00002.safetensors",
            "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 99\n",
            4,
            "a Git LFS pointer, not weights (expects 99 bytes)",
        ),
        ("config.json", '{"model_type": "llama"}', 3, "model_type 'llama'; supported: 'gpt_oss'"),
        ("config.json", "{", 4, "not JSON"),
        ("config.json", "{}", 3, "not a GPT-OSS checkpoint"),
        ("adapter_config.json", "{}", 3, "a LoRA adapter, not a model"),
    ],
)
def test_what_is_no_model_is_named(mxfp4: Path, name: str, content: str, status: int, message: str):
    (mxfp4 / name).write_text(content)
    with pytest.raises(GptossError) as refused:
        inspect(mxfp4)
    assert message in str(refused.value)
    assert refused.value.exit_code == status

"""Models of unusual sizes and configurations, written by transformers: converted and verified."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gptoss_convert.check.check import check
from gptoss_convert.conversion.options import Options
from gptoss_convert.conversion.plan import plan
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.checkpoint import Choices
from gptoss_convert.synth.synth import synth
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions
from tests import odd_models


def convert(source: Path, target: Path, to: str = "hf", **options: Any) -> Path:
    run(plan(source, target, Options(to, workers=1, **options)))
    return target


def logits_of(directory: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.arange(30).remainder(model.config.vocab_size).unsqueeze(0)
    with torch.inference_mode():
        return model(tokens, use_cache=False).logits


def verdict(source: Path, target: Path, level: str = "logits") -> str:
    return verify_checkpoints(source, target, VerifyOptions(level=level, device="cpu")).verdict


def test_sizes_need_not_be_whole_blocks_without_mxfp4(tmp_path: Path):
    source = odd_models.save(tmp_path / "source")
    megatron = convert(source, tmp_path / "megatron", "megatron")
    back = convert(megatron, tmp_path / "back")
    again = convert(source, tmp_path / "again")
    assert torch.equal(logits_of(source), logits_of(back))
    assert torch.equal(logits_of(source), logits_of(again))
    assert verdict(source, megatron).startswith("same")


@pytest.mark.parametrize(("to", "dtype"), [("hf", "mxfp4"), ("openai", "keep")])
def test_mxfp4_needs_whole_blocks_and_says_so(tmp_path: Path, to: str, dtype: str):
    source = odd_models.save(tmp_path / "source")
    with pytest.raises(InputError) as refused:
        plan(source, tmp_path / "target", Options(to, dtype))
    assert str(refused.value) == (
        "config: hidden_size is 8, no multiple of 32: MXFP4 encodes whole blocks of 32 values; "
        "BF16 experts can have any size"
    )


def test_quantization_config_null_is_none(tmp_path: Path):
    source = odd_models.edit(odd_models.save(tmp_path / "source"), quantization_config=None)
    target = convert(source, tmp_path / "target")
    assert "quantization_config" not in json.loads((target / "config.json").read_text())
    assert verdict(source, target).startswith("same")


LEFTOVERS = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
    {"load_in_8bit": True},
    {},
]


@pytest.mark.parametrize("leftover", LEFTOVERS)
def test_leftovers_of_another_quantisation_are_read_with_repair(
    tmp_path: Path, leftover: dict[str, Any]
):
    source = odd_models.save(tmp_path / "source")
    good = convert(source, tmp_path / "good")
    odd_models.edit(source, quantization_config=leftover)
    method = str(leftover.get("quant_method"))
    with pytest.raises(IntegrityError) as refused:
        convert(source, tmp_path / "target")
    assert str(refused.value) == (
        f"{source}/config.json: has quantization_config {method!r}, the experts are BF16; "
        "pass --repair to go by the tensors"
    )
    target = convert(source, tmp_path / "target", repair=True)
    for name in ("config.json", "model.safetensors"):
        assert (target / name).read_bytes() == (good / name).read_bytes()


def rope(**changes: Any) -> dict[str, Any]:
    section = {**odd_models.TINY["rope_parameters"], **changes}
    return {"rope_parameters": {k: v for k, v in section.items() if v is not ...}}


ODD: dict[str, dict[str, Any]] = {
    "a factor of cosines of its own": rope(attention_factor=1.75),
    "two scales that make one": rope(mscale=0.5, mscale_all_dim=2.0),
    "one scale, which nobody reads": rope(mscale=0.5),
    "rounded frequencies": rope(truncate=True),
    "truncate left out": rope(truncate=...),
    "betas left out": rope(beta_fast=..., beta_slow=...),
    "original length left out": rope(original_max_position_embeddings=...),
    "theta left out": rope(rope_theta=...),
    "the older name of rope_type": rope(type="yarn", rope_type=...),
    "a factor of null": rope(factor=None),
    "no rope at all": {"rope_parameters": ..., "rope_scaling": None},
    "rope of transformers 4": {
        "rope_parameters": ...,
        "rope_scaling": rope(rope_theta=...)["rope_parameters"],
        "rope_theta": 500,
    },
    "numbers left out": {"swiglu_limit": ..., "rms_norm_eps": ..., "layer_types": ...},
    "another name of the experts": {"num_local_experts": ..., "num_experts": 4},
    "a wrapper's class": {"architectures": ["FSDPGptOssForCausalLM"]},
    "float32, it says": {"dtype": "float32", "torch_dtype": "float32"},
    "a window beyond every prompt": {"sliding_window": 1 << 30},
    "every expert for every token": {"num_experts_per_tok": 4},
    "one expert a token": {"num_experts_per_tok": 1},
}


@pytest.mark.parametrize("name", ODD)
def test_an_odd_configuration_is_the_same_model_in_target(tmp_path: Path, name: str):
    source = odd_models.edit(odd_models.save(tmp_path / "source"), **ODD[name])
    target = convert(source, tmp_path / "target")
    assert torch.equal(logits_of(source), logits_of(target))
    # YaRN as released begins at 4096 positions, which take a while.
    level = "values" if name == "no rope at all" else "oracle"
    assert verdict(source, target, level).startswith("same")
    written = json.loads((target / "config.json").read_text())
    assert written["architectures"] == ["GptOssForCausalLM"]
    assert {written.get("dtype"), written.get("torch_dtype")} <= {None, "bfloat16"}


@pytest.mark.parametrize("name", ["rounded frequencies", "a factor of cosines of its own"])
def test_megatron_says_what_it_can_and_refuses_what_it_cannot(tmp_path: Path, name: str):
    source = odd_models.edit(odd_models.save(tmp_path / "source"), **ODD[name])
    if "factor" in name:
        with pytest.raises(InputError, match=r"attention_factor is 1.75, Megatron's YaRN has"):
            plan(source, tmp_path / "target", Options("megatron"))
        return
    target = convert(convert(source, tmp_path / "megatron", "megatron"), tmp_path / "target")
    assert torch.equal(logits_of(source), logits_of(target))


def test_another_factor_of_cosines_is_another_model(tmp_path: Path):
    source = odd_models.save(tmp_path / "source")
    target = convert(source, tmp_path / "target")
    odd_models.edit(source, **ODD["a factor of cosines of its own"])
    assert verdict(source, target, "header") == (
        "different: attention_factor is 1.75 in SOURCE, None in TARGET"
    )


def test_tokens_beyond_the_vocabulary_are_left_out(tmp_path: Path):
    changes = {"pad_token_id": 199999, "eos_token_id": [2, 200002], "bos_token_id": 40}
    source = odd_models.edit(odd_models.save(tmp_path / "source"), **changes)
    conversion = plan(source, tmp_path / "target", Options("hf", workers=1))
    run(conversion)
    written = json.loads((tmp_path / "target/config.json").read_text())
    assert written["eos_token_id"] == [2]
    assert not {"pad_token_id", "bos_token_id"} & written.keys()
    assert any("pad_token_id is 199999, left out of TARGET" in note for note in conversion.notes)
    logits_of(tmp_path / "target")


def test_a_side_that_transformers_refuses_is_a_finding(tmp_path: Path):
    source = odd_models.save(tmp_path / "source")
    target = convert(source, tmp_path / "target")
    odd_models.edit(source, pad_token_id=199999)
    found = verify_checkpoints(source, target, VerifyOptions(level="oracle", device="cpu"))
    assert not found.same
    assert "its own model code refuses it" in found.verdict


def test_float32_becomes_bfloat16_in_every_key(tmp_path: Path):
    source = odd_models.save(tmp_path / "source", torch.float32)
    assert json.loads((source / "config.json").read_text())["dtype"] == "float32"
    target = convert(source, tmp_path / "target", cast=True)
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"
    megatron = convert(source, tmp_path / "megatron", "megatron", cast=True)
    assert json.loads((megatron / "hf/config.json").read_text())["dtype"] == "bfloat16"


def shards_of(source: Path, target: Path) -> Path:
    """The model in several shards with an index."""
    return convert(source, target, max_shard_size=4000)


@pytest.mark.parametrize("kind", ["another file", "in the index", "without an index"])
def test_two_models_in_one_directory(tmp_path: Path, kind: str):
    source = odd_models.save(tmp_path / "source")
    both = shards_of(source, tmp_path / "both")
    manifest = both / "gptoss-convert.json"
    manifest.unlink()
    other = odd_models.save(tmp_path / "other")
    newer = other / "model.safetensors"
    newer.write_bytes(newer.read_bytes())
    if kind == "without an index":
        # transformers reads model.safetensors alone, and so does everything here.
        (both / "model.safetensors.index.json").unlink()
        (both / "model.safetensors").write_bytes(newer.read_bytes())
        assert torch.equal(logits_of(both), logits_of(other))
        assert verdict(both, other).startswith("same")
        assert any("not read" in note for note in plan(both, tmp_path / "t", Options("hf")).notes)
        return
    if kind == "in the index":
        index = both / "model.safetensors.index.json"
        first = min(path.name for path in both.glob("model-*.safetensors"))
        index.write_text(index.read_text().replace(first, "model.safetensors"))
        (both / first).rename(both / "model.safetensors")
    else:
        (both / "model.safetensors").write_bytes(newer.read_bytes())
    for read in (
        lambda: plan(both, tmp_path / "target", Options("hf")),
        lambda: check(both),
        lambda: verdict(both, other),
        lambda: verdict(other, both),
    ):
        with pytest.raises(IntegrityError, match=r"holds two models: model\.safetensors, which"):
            read()


def test_openai_s_code_reads_every_file(tmp_path: Path):
    source = tmp_path / "source"
    synth(source, format="openai")
    (source / "spare.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    with pytest.raises(IntegrityError, match=r"holds two models: OpenAI's code reads every"):
        check(source)


def test_links_into_a_store_are_read_when_asked(tmp_path: Path):
    source = odd_models.save(tmp_path / "source")
    (source / "tokenizer.json").write_text("{}")
    linked, store = tmp_path / "linked", tmp_path / "store"
    for folder in (linked, store):
        folder.mkdir()
    for path in source.iterdir():
        (store / path.name).write_bytes(path.read_bytes())
        (linked / path.name).symlink_to(store / path.name)
    with pytest.raises(InputError, match=r"outside the checkpoint; pass --follow-links if you"):
        plan(linked, tmp_path / "target", Options("hf"))
    target = convert(linked, tmp_path / "target", follow_links=True)
    assert not any(path.is_symlink() for path in target.iterdir())
    assert (target / "tokenizer.json").read_text() == "{}"
    both = Choices(follow_links=True)
    options = VerifyOptions(level="oracle", device="cpu", source=both, target=both)
    assert verify_checkpoints(linked, linked, options).same
    assert verify_checkpoints(linked, target, VerifyOptions(source=both, device="cpu")).same
    with pytest.raises(InputError, match=r"pass --follow-links"):
        verify_checkpoints(target, linked, options=VerifyOptions(source=both))


def test_verify_reads_each_side_as_it_is_told(tmp_path: Path):
    source = odd_models.save(tmp_path / "source", torch.float32)
    target = convert(source, tmp_path / "target", cast=True)
    with pytest.raises(InputError, match="pass --cast to round it to BF16"):
        verdict(source, target)
    cast = VerifyOptions(level="oracle", device="cpu", source=Choices(cast=True))
    assert verify_checkpoints(source, target, cast).verdict.startswith("same")
    leftover = odd_models.edit(source, quantization_config={"quant_method": "bitsandbytes"})
    both = Choices(cast=True, repair=True)
    repaired = VerifyOptions(level="oracle", device="cpu", target=both)
    assert verify_checkpoints(target, leftover, repaired).verdict.startswith("same")


def test_verify_reads_what_transformers_mis_saved(tmp_path: Path):
    source = odd_models.save(tmp_path / "source", hidden_size=32, intermediate_size=64)
    target = convert(source, tmp_path / "target")
    file = source / "model.safetensors"
    tensors = {
        name + "_blocks" * name.endswith(("gate_up_proj", "down_proj")): tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, {"format": "pt"})
    repaired = VerifyOptions(level="oracle", device="cpu", source=Choices(repair=True))
    assert verify_checkpoints(source, target, repaired).verdict.startswith("same")


def test_the_longest_position_survives_openai_s_layout(tmp_path: Path):
    first = tmp_path / "first"
    synth(first)
    source = odd_models.edit(first, max_position_embeddings=8192, a_key_of_mine="kept")
    conversion = plan(source, tmp_path / "openai", Options("openai", workers=1))
    run(conversion)
    assert any("max_position_embeddings is 8192: OpenAI's config" in n for n in conversion.notes)
    target = convert(tmp_path / "openai", tmp_path / "target")
    written = json.loads((target / "config.json").read_text())
    assert (written["max_position_embeddings"], written["a_key_of_mine"]) == (8192, "kept")
    assert verdict(source, tmp_path / "openai", "header").startswith("same")
    assert verdict(source, target, "header").startswith("same")
    other = json.loads((tmp_path / "openai/hf/config.json").read_text())
    other["swiglu_limit"] = 6.0
    (tmp_path / "openai/hf/config.json").write_text(json.dumps(other))
    with pytest.raises(IntegrityError, match=r"describes another model than config\.json"):
        plan(tmp_path / "openai", tmp_path / "again", Options("hf"))


def test_nothing_is_added_to_openai_s_layout_where_it_says_all(tmp_path: Path):
    synth(tmp_path / "source")
    target = convert(tmp_path / "source", tmp_path / "target", "openai")
    assert not (target / "hf").exists()


def test_the_longest_position_survives_megatron_without_its_hf_folder(tmp_path: Path):
    # The numbers that Megatron's fields do not state are taken as released.
    released = rope(
        factor=32.0, beta_fast=32.0, original_max_position_embeddings=4096, rope_theta=150000.0
    )
    changes = {**released, "sliding_window": 128, "max_position_embeddings": 8192}
    source = odd_models.edit(odd_models.save(tmp_path / "source"), **changes)
    megatron = convert(source, tmp_path / "megatron", "megatron")
    shutil.rmtree(megatron / "hf")
    conversion = plan(megatron, tmp_path / "target", Options("hf", vocab_size=40, workers=1))
    assert conversion.source.config.max_position_embeddings == 8192

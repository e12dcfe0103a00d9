"""What trainers leave: each form comes out as the state dict that was saved, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptoss_convert import Options, convert
from gptoss_convert.check.inspection import inspect
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats.checkpoint import DEFAULT, Choices
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions
from tests.test_torch_dist import save_with_dcp
from tests.tiny_files import hf_config
from tests.tiny_models import DISTINCT, hf_bf16_tensors, random_weights
from tests.trainer_names import fused, per_expert, torchtitan

SHAPE = replace(DISTINCT, layers=2)
MODEL = hf_bf16_tensors(random_weights(SHAPE, seed=11))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config.json of the model."""
    path = tmp_path_factory.mktemp("config") / "config.json"
    path.write_text(json.dumps(hf_config(SHAPE, mxfp4=False)))
    return path


def converted(source: Path, target: Path, config: Path | None = None, **options: Any) -> Path:
    convert(source, target, Options("hf", config=config, workers=1, **options))
    return target


def assert_is_the_model(directory: Path, model: Mapping[str, Tensor] = MODEL) -> None:
    found = {n: t for file in directory.glob("*.safetensors") for n, t in load_file(file).items()}
    assert found.keys() == model.keys()
    assert not [name for name, tensor in model.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("place", ["pytorch_model_fsdp_0", "policy/weights", ""])
def test_a_state_dict_saved_by_dcp_comes_out_as_it_was(tmp_path: Path, config: Path, place: str):
    source = tmp_path / "checkpoint-3"
    optimizer = {"state": {name: {"exp_avg": one.float()} for name, one in MODEL.items()}}
    save_with_dcp(source / place, {"model": MODEL, "optim": optimizer})
    assert_is_the_model(converted(source, tmp_path / "out", config))
    found = inspect(source, Choices(config=config)).summary()
    assert found["details"]["skipped"] == {"optimizer": len(MODEL)}
    assert found["details"]["lacks"] == ["config.json", "a tokenizer"]


def test_what_a_dcp_lacks_is_told(tmp_path: Path):
    save_with_dcp(tmp_path / "ck" / "pytorch_model_fsdp_0", {"model": MODEL})
    with pytest.raises(InputError) as refused:
        converted(tmp_path / "ck", tmp_path / "out")
    assert str(refused.value) == (
        f"{tmp_path}/ck/pytorch_model_fsdp_0: a PyTorch distributed checkpoint, by accelerate "
        "(Trainer, TRL, axolotl) with FSDP; it lacks config.json and a tokenizer: pass --config "
        "CONFIG_JSON, that of the model it was trained from"
    )


def test_a_configuration_in_the_checkpoint_s_own_folder_is_found(tmp_path: Path, config: Path):
    save_with_dcp(tmp_path / "ck" / "pytorch_model_fsdp_0", {"model": MODEL})
    (tmp_path / "ck" / "config.json").write_bytes(config.read_bytes())
    (tmp_path / "config.json").write_text("{}")
    assert_is_the_model(converted(tmp_path / "ck", tmp_path / "out"))


def test_an_unfinished_save_of_dcp_is_named(tmp_path: Path, config: Path):
    save_with_dcp(tmp_path, {"model": {"x": MODEL["lm_head.weight"]}})
    (tmp_path / "config.json").write_bytes(config.read_bytes())
    (tmp_path / ".metadata").rename(tmp_path / ".metadata.tmp")
    with pytest.raises(IntegrityError, match=r"no \.metadata: an unfinished"):
        inspect(tmp_path)


def test_an_optimizer_alone_is_named(tmp_path: Path, config: Path):
    optimizer = {"state": {name: {"exp_avg": one.float()} for name, one in MODEL.items()}}
    save_with_dcp(tmp_path / "optimizer_0", {"optimizer": optimizer})
    with pytest.raises(InputError, match=f"no weights, only a trainer's state .{len(MODEL)} opt"):
        converted(tmp_path / "optimizer_0", tmp_path / "out", config)


@pytest.mark.parametrize("names", ["first", "fused", "last"])
def test_torchtitan_s_checkpoints_of_every_generation(
    tmp_path: Path, config: Path, plain: Path, names: str
):
    first = names == "first"
    bias = {
        f"layers.{n}.moe.expert_bias{'' if first else '_E'}": torch.tensor([0.0, -0.0] * 4)
        for n in range(SHAPE.layers)
    }
    model = {name: one.float() for name, one in torchtitan(MODEL, first=first).items()}
    model = fused(model, SHAPE) if names == "fused" else model
    optimizer = {f"optimizer.state.{name}.exp_avg": one for name, one in model.items()}
    save_with_dcp(tmp_path / "step-9", {**model, **bias, **optimizer})
    assert_is_the_model(converted(tmp_path / "step-9", tmp_path / "out", config, cast=True))
    details = inspect(tmp_path / "step-9", Choices(config=config)).summary()["details"]
    assert details["skipped"] == {"optimizer": len(model), "zero": SHAPE.layers}
    assert details["written_by"] == "torchtitan"
    assert differs(tmp_path / "step-9", plain, Choices(config=config, cast=True)).startswith("same")


def test_a_bias_of_experts_that_is_not_zero_is_refused(tmp_path: Path, config: Path):
    bias = torch.zeros(SHAPE.experts)
    bias[5] = 1e-3
    save_with_dcp(tmp_path / "step-9", {**torchtitan(MODEL), "layers.1.moe.expert_bias_E": bias})
    with pytest.raises(InputError) as refused:
        converted(tmp_path / "step-9", tmp_path / "out", config)
    assert str(refused.value) == (
        f"{tmp_path}/step-9: layers.1.moe.expert_bias_E is not zero: torchtitan's balance of load "
        "moves which experts a router chooses, which no format here can say; --drop "
        "'*.expert_bias_E' leaves it out all the same"
    )
    dropped = ("*.expert_bias_E",)
    assert_is_the_model(converted(tmp_path / "step-9", tmp_path / "out", config, drop=dropped))


@pytest.mark.parametrize("ranks", [3, 5])
def test_shards_of_ranks_are_put_together(tmp_path: Path, config: Path, ranks: int):
    """As torch's writer cuts and names them; 8 experts on 5 ranks leave the last without any.

    NeMo Automodel puts the configuration into a hidden folder beside them.
    """
    write_shards(tmp_path / "step" / "model", MODEL, ranks)
    beside = tmp_path / "step" / "model" / ".hf_metadata"
    beside.mkdir()
    (beside / "config.json").write_bytes(config.read_bytes())
    (tmp_path / "step" / "model" / "other.safetensors").write_bytes(b"of another save")
    assert_is_the_model(converted(tmp_path / "step", tmp_path / "out"))
    notes = inspect(tmp_path / "step").summary()["notes"]
    assert any("beside the ranks' shards other.safetensors: not read" in one for one in notes)


def write_shards(folder: Path, model: Mapping[str, Tensor], ranks: int) -> None:
    folder.mkdir(parents=True)
    for rank in range(ranks):
        held, offsets = {}, {}
        for name, tensor in model.items():
            rows = -(-len(tensor) // ranks)
            held[name] = tensor[rank * rows : (rank + 1) * rows].contiguous()
            start = [min(rank * rows, len(tensor)), *(0 for _ in tensor.shape[1:])]
            offsets[name] = {"saved_offsets": start}
        said = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets), "format": "pt"}
        save_file(held, folder / f"shard-{rank + 1:05d}-model-00001-of-00001.safetensors", said)


def test_a_missing_shard_is_told(tmp_path: Path, config: Path):
    write_shards(tmp_path / "model", MODEL, 3)
    files = sorted((tmp_path / "model").iterdir())
    files[1].unlink()
    with pytest.raises(IntegrityError, match="the shards of 1 of 3 ranks are missing"):
        inspect(tmp_path / "model", Choices(config=config))
    files[2].unlink()
    with pytest.raises(InputError, match="expects shape"):
        inspect(tmp_path / "model", Choices(config=config))


def save(
    folder: Path, model: Mapping[str, Tensor], config: Path | None = None, **said: Any
) -> Path:
    """A directory of safetensors as `save_pretrained` leaves it."""
    folder.mkdir(parents=True)
    tensors = {name: tensor.contiguous() for name, tensor in model.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    if config is not None:
        content = json.loads(config.read_text()) | said
        (folder / "config.json").write_text(json.dumps(content))
    return folder


def differs(source: Path, target: Path, choices: Choices = DEFAULT, level: str = "logits") -> str:
    """The verdict of `verify`, on few positions."""
    asked = VerifyOptions(
        level=level, source=choices, device="cpu", workers=1, max_length=40, sample=100
    )
    return verify_checkpoints(source, target, asked).verdict


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """The model as transformers has it."""
    return save(tmp_path_factory.mktemp("plain") / "hf", MODEL, config)


@pytest.mark.parametrize(
    ("writer", "gate_proj", "swapped"),
    [
        ("unsloth", None, ("gate_up_projs.3.weight", "gate_up_projs.4.weight")),
        ("before", None, ("experts.3.gate_proj.weight", "experts.3.up_proj.weight")),
        ("since", "half", ("3.gate_proj.weight", "3.up_proj.weight")),
        ("now", "gate", ("3.down_proj.bias", "4.down_proj.bias")),
    ],
)
def test_a_tensor_for_each_expert(
    tmp_path: Path,
    config: Path,
    plain: Path,
    writer: str,
    gate_proj: str | None,
    swapped: tuple[str, str],
):
    model, said = per_expert(MODEL, writer), Choices(gate_proj=gate_proj)
    source = save(tmp_path / "source", model, config)
    assert_is_the_model(converted(source, tmp_path / "out", gate_proj=gate_proj))
    assert differs(source, plain, said).startswith("same")
    details = inspect(source, said).summary()["details"]
    assert details["written_by"].startswith("unsloth" if writer == "unsloth" else "llm-compressor")
    assert details["lacks"] == ["a tokenizer"]
    first, second = (f"model.layers.1.mlp.experts.{name}" for name in swapped)
    shifted = {**model, first: model[second], second: model[first]}
    mutant = save(tmp_path / "mutant", shifted, config)
    assert differs(mutant, plain, said, level="values").startswith("different")


def test_what_gate_proj_holds_is_asked_and_a_wrong_answer_is_seen(
    tmp_path: Path, config: Path, plain: Path
):
    """llm-compressor had two meanings for the same names."""
    source = save(tmp_path / "source", per_expert(MODEL, "now"), config)
    with pytest.raises(UsageError) as refused:
        converted(source, tmp_path / "out")
    assert "pass --gate-proj half or --gate-proj gate" in str(refused.value)
    wrong = Choices(gate_proj="half")
    assert differs(source, plain, wrong, level="values").startswith("different")
    assert differs(source, plain, wrong).startswith("different")
    with pytest.raises(UsageError, match="is for names such as experts"):
        converted(plain, tmp_path / "out", gate_proj="gate")


@pytest.mark.parametrize("prefix", ["module.", "base_model.model.", "pretrained_model."])
def test_a_wrapped_model_with_a_value_head(tmp_path: Path, config: Path, plain: Path, prefix: str):
    model = {prefix + name: one for name, one in MODEL.items()}
    source = save(tmp_path / "source", {**model, "v_head.summary.weight": torch.ones(2)}, config)
    with pytest.raises(InputError, match=r"a value head.*--drop '\*v_head\*'"):
        converted(source, tmp_path / "out")
    dropping = Choices(drop=("v_head.*",))
    assert_is_the_model(converted(source, tmp_path / "out", drop=dropping.drop))
    assert differs(source, plain, dropping).startswith("same")


def test_an_unknown_tensor_is_named_with_the_way_to_leave_it_out(tmp_path: Path, config: Path):
    source = save(tmp_path / "source", {**MODEL, "extra.gain": torch.ones(2)}, config)
    with pytest.raises(IntegrityError) as refused:
        converted(source, tmp_path / "out")
    assert str(refused.value) == (
        f"{source}: 1 unknown tensors: extra.gain; --drop PATTERN leaves out what is not the "
        "model's"
    )
    assert_is_the_model(converted(source, tmp_path / "out", drop=("extra.*",)))


def test_a_merge_without_a_configuration_is_read_with_the_base_model_s(
    tmp_path: Path, config: Path, plain: Path
):
    source = save(tmp_path / "merged", {name: one.float() for name, one in MODEL.items()})
    with pytest.raises(InputError, match=r"safetensors without a config\.json .* --config CONFIG"):
        converted(source, tmp_path / "out")
    base = tmp_path / "config.json"
    base.write_text(json.dumps(hf_config(SHAPE, mxfp4=True)))
    assert_is_the_model(converted(source, tmp_path / "out", base, cast=True))
    assert differs(source, plain, Choices(config=base, cast=True)).startswith("same")


def test_a_vocabulary_that_training_resized(tmp_path: Path, config: Path):
    rows = torch.ones(3, SHAPE.hidden, dtype=torch.bfloat16)
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    model = {name: torch.cat((one, rows)) if name in ends else one for name, one in MODEL.items()}
    source = save(tmp_path / "source", model, config)
    with pytest.raises(InputError) as refused:
        converted(source, tmp_path / "out")
    assert str(refused.value) == (
        f"{source}/config.json: vocab_size is 353, the embedding and the head have 356 rows: where "
        "training resized the vocabulary, pass --vocab-size 356"
    )
    with pytest.raises(UsageError, match="--vocab-size is 355, the tensors have 356 rows"):
        converted(source, tmp_path / "out", vocab_size=355)
    out = converted(source, tmp_path / "out", vocab_size=356)
    assert_is_the_model(out, model)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 356


def test_a_tied_vocabulary_is_written_twice(tmp_path: Path, config: Path):
    tied = {name: one for name, one in MODEL.items() if name != "lm_head.weight"}
    source = save(tmp_path / "source", tied, config, tie_word_embeddings=True)
    out = converted(source, tmp_path / "out")
    model = {**MODEL, "lm_head.weight": MODEL["model.embed_tokens.weight"]}
    assert_is_the_model(out, model)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] is False
    assert differs(source, out).startswith("same")


def test_torchtitan_s_export_is_read_with_repair(tmp_path: Path, config: Path, plain: Path):
    """The names of packed blocks, float values, experts output-major."""
    model = torchtitan_export(MODEL)
    source = save(tmp_path / "source", model)
    with pytest.raises(IntegrityError, match="as torchtitan exports them, output-major; pass --re"):
        converted(source, tmp_path / "out", config)
    assert_is_the_model(converted(source, tmp_path / "out", config, repair=True))
    assert differs(source, plain, Choices(config=config, repair=True)).startswith("same")
    write_shards(tmp_path / "step" / "sharded", model, 3)
    with pytest.raises(IntegrityError, match="as torchtitan exports them, output-major; pass --re"):
        converted(tmp_path / "step", tmp_path / "again", config)
    assert_is_the_model(converted(tmp_path / "step", tmp_path / "again", config, repair=True))


def torchtitan_export(model: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's names as torchtitan's adapter writes them until May 2026, and from September
    on."""
    weights = (".gate_up_proj", ".down_proj")
    return {
        name + "_blocks" * name.endswith(weights): one.transpose(1, 2)
        if name.endswith(weights)
        else one
        for name, one in model.items()
    }


def test_torchtitan_s_export_without_experts_is_named(tmp_path: Path, config: Path):
    model = {name: one for name, one in MODEL.items() if ".experts." not in name}
    with pytest.raises(
        InputError, match=r"a model without its experts, as torchtitan 0\.3 exports"
    ):
        converted(save(tmp_path / "source", model, config), tmp_path / "out")


def test_what_is_dropped_may_be_of_any_dtype(tmp_path: Path, config: Path):
    extra = {"model.position_ids": torch.arange(4), "optimizer.step": torch.tensor(3)}
    source = save(tmp_path / "source", {**MODEL, **extra}, config)
    with pytest.raises(InputError, match=r"model\.position_ids: dtype 'I64' has no place"):
        converted(source, tmp_path / "out")
    assert_is_the_model(converted(source, tmp_path / "out", drop=("*position_ids",)))


def test_a_directory_may_stand_for_its_configuration(tmp_path: Path, plain: Path):
    write_shards(tmp_path / "model", MODEL, 2)
    target = tmp_path / "megatron"
    convert(tmp_path / "model", target, Options("megatron", config=plain, workers=1))
    assert_is_the_model(converted(target, tmp_path / "out"))

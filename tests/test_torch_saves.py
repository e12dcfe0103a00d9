"""Files of `torch.save` that trainers leave: read in place, whole, and never executed."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gptoss_convert import Options, convert
from gptoss_convert.check.inspection import inspect
from gptoss_convert.containers import torch_saves
from gptoss_convert.errors import GptossError, InputError, IntegrityError
from gptoss_convert.formats.checkpoint import DEFAULT, Choices
from gptoss_convert.formats.registry import open_checkpoint
from gptoss_convert.verify.gate import verify_checkpoints
from gptoss_convert.verify.result import VerifyOptions
from tests.rank_saves import WAYS, save_ranks
from tests.tiny_files import hf_config, write_hf_bf16
from tests.tiny_models import DISTINCT, TinyShape, hf_bf16_tensors, random_weights

SHAPE: TinyShape = replace(DISTINCT, layers=1, experts=5)
"""Five experts on four ranks: two, two, one and none."""
WEIGHTS = random_weights(SHAPE, seed=12)
MODEL = hf_bf16_tensors(WEIGHTS)
RANKS = 4


def with_config(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(hf_config(SHAPE, mxfp4=False)))
    return folder


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What verl leaves of each way to cut the model, and the model as Hugging Face has it."""
    folder = tmp_path_factory.mktemp("ranks")
    for way in WAYS:
        actor = save_ranks(folder / way / "actor", MODEL, way, RANKS)
        with_config(actor / "huggingface")
        settings = {"FSDP_version": 2, "world_size": RANKS}
        (actor / "fsdp_config.json").write_text(json.dumps(settings))
        (actor / "optim_world_size_4_rank_0.pt").write_bytes(b"not read")
    write_hf_bf16(folder / "hf", SHAPE, WEIGHTS)
    return folder


def converted(source: Path, target: Path, **options: Any) -> dict[str, Tensor]:
    convert(source, target, Options("hf", workers=1, **options))
    return {n: t for file in target.glob("*.safetensors") for n, t in load_file(file).items()}


def assert_is_the_model(found: dict[str, Tensor]) -> None:
    assert found.keys() == MODEL.keys()
    assert not [name for name, tensor in MODEL.items() if not torch.equal(found[name], tensor)]


@pytest.mark.parametrize("way", WAYS)
def test_all_ranks_together_are_the_model(saved: Path, tmp_path: Path, way: str):
    assert_is_the_model(converted(saved / way, tmp_path / "out"))
    found = inspect(saved / way).summary()
    assert found["format"] == "rank-files-bf16"
    assert found["details"]["written_by"] == "verl"
    assert found["details"]["files"] == RANKS
    assert (found["details"]["replicas"] > 0) == (way in {"hsdp", "experts_apart"})
    assert found["details"]["skipped"] == {"optimizer file": 1}


def test_verify_reads_rank_files_by_itself(saved: Path):
    result = verify_checkpoints(
        saved / "hf",
        saved / "fsdp2",
        VerifyOptions(level="logits", device="cpu", max_length=40, sample=100, workers=1),
    )
    assert result.same, result


def copied(saved: Path, target: Path, way: str = "fsdp2") -> Path:
    shutil.copytree(saved / way, target)
    return target / "actor"


def rank_file(rank: int) -> str:
    return f"model_world_size_{RANKS}_rank_{rank}.pt"


def test_a_shard_of_another_step_is_not_the_model(saved: Path, tmp_path: Path):
    other = {name: tensor + 1 for name, tensor in MODEL.items()}
    stale = save_ranks(tmp_path / "stale", other, "sharded", RANKS)
    actor = copied(saved, tmp_path / "source", "sharded")
    shutil.copy(stale / rank_file(2), actor / rank_file(2))
    result = verify_checkpoints(
        saved / "hf", tmp_path / "source", VerifyOptions(level="values", workers=1)
    )
    assert not result.same


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a / rank_file(2)).unlink(), r"files of 1 of 4 ranks missing: 2$"),
        (
            lambda a: shutil.copy(a / rank_file(0), a / "model_world_size_2_rank_0.pt"),
            r"files of 2 and of 4 ranks: two saves",
        ),
        (
            lambda a: shutil.copy(a / rank_file(1), a / rank_file(2)),
            r"model\.layers\.0\.[^ ]+|model\.[^ ]+: no chunk covers index|lm_head",
        ),
        (
            lambda a: (a / "fsdp_config.json").write_text('{"world_size": 8}'),
            r"world_size is 8, found 4 rank files",
        ),
    ],
)
def test_ranks_that_do_not_make_a_whole_are_refused(
    saved: Path, tmp_path: Path, change: Any, message: str
):
    change(copied(saved, tmp_path / "source"))
    with pytest.raises(IntegrityError, match=message):
        open_checkpoint(tmp_path / "source")


def test_an_unknown_key_of_verl_is_refused(saved: Path, tmp_path: Path):
    actor = copied(saved, tmp_path / "source")
    (actor / "fsdp_config.json").write_text('{"rows": "reversed"}')
    with pytest.raises(InputError, match="rows is not known here"):
        open_checkpoint(tmp_path / "source")


def test_a_folder_of_steps_names_one(saved: Path, tmp_path: Path):
    shutil.copytree(saved / "sharded", tmp_path / "run" / "global_step_20")
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("20")
    with pytest.raises(InputError, match=r"name one of them, such as .*global_step_20"):
        open_checkpoint(tmp_path / "run")


PLAIN: dict[str, Any] = {
    "pytorch_model.bin": lambda model: model,
    "pytorch_model_fsdp.bin": lambda model: model,
    "model.pt": lambda model: {"model": model, "step": 3, "optimizer": {"state": {0: model}}},
    "model.pth": lambda model: {"state_dict": {f"module.{n}": t for n, t in model.items()}},
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_whole_model_in_one_file_comes_out_as_it_was(tmp_path: Path, name: str):
    source = with_config(tmp_path / "source")
    torch.save(PLAIN[name](dict(MODEL)), source / name)
    assert_is_the_model(converted(source, tmp_path / "out"))
    found = inspect(source).summary()["details"]["skipped"]
    assert found == ({"optimizer": len(MODEL), "other": 1} if name == "model.pt" else {})


def test_shards_with_an_index_are_one_model(tmp_path: Path):
    source = with_config(tmp_path / "source")
    names = sorted(MODEL)
    shards = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for shard, own in shards.items():
        torch.save({name: MODEL[name] for name in own}, source / shard)
    index = {"weight_map": {name: shard for shard, own in shards.items() for name in own}}
    (source / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    assert_is_the_model(converted(source, tmp_path / "out"))
    (source / "pytorch_model-00003-of-00003.bin").write_bytes(b"of another save")
    assert open_checkpoint(source).notes[-1].endswith(": not read")
    (source / "pytorch_model-00003-of-00003.bin").unlink()

    def refused(weight_map: dict[str, str], message: str) -> None:
        text = json.dumps({"weight_map": weight_map})
        (source / "pytorch_model.bin.index.json").write_text(text)
        with pytest.raises(IntegrityError, match=message):
            open_checkpoint(source)

    first, second = shards
    said = index["weight_map"]
    refused(said | {"x": first}, f"x: expected in {first}, found nowhere")
    refused(said | {names[0]: second}, f"{names[0]}: expected in {second}, found in {first}"[:20])
    refused({n: s for n, s in said.items() if n != names[1]}, f"{names[1]} of .* not in the index")
    torch.save({name: MODEL[name] for name in names[1:]}, source / second)
    refused(said, f"{names[2]}: stored in {first} and again in {second}")
    (source / first).unlink()
    (source / second).unlink()
    refused(said, f"2 of 2 shards missing: {first}, {second}")
    torch.save({}, source / "model.pt")
    with pytest.raises(IntegrityError, match="holds 2 models"):
        open_checkpoint(source)


def test_halves_for_interleaved_rows_are_not_the_model(saved: Path, tmp_path: Path):
    name = "model.layers.0.mlp.experts.gate_up_proj"
    source = with_config(tmp_path / "source")
    halves = torch.cat((MODEL[name][..., ::2], MODEL[name][..., 1::2]), dim=-1)
    torch.save({**MODEL, name: halves}, source / "pytorch_model.bin")
    options = VerifyOptions(level="values", workers=1)
    result = verify_checkpoints(saved / "hf", source, options)
    assert not result.same


def saved_alone(tmp_path: Path, value: object, **options: Any) -> Path:
    source = with_config(tmp_path / "source")
    torch.save(value, source / "model.pt", **options)
    return source


def test_the_older_forms_of_torch_save_are_refused_by_name(tmp_path: Path):
    source = saved_alone(tmp_path, dict(MODEL), _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match=r"before torch 1\.6.*save it anew"):
        open_checkpoint(source)
    (source / "model.pt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(InputError, match="a bare pickle"):
        open_checkpoint(source)


def test_a_compressed_archive_is_refused(tmp_path: Path):
    source = saved_alone(tmp_path, {"a": torch.ones(99)})
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(source / "model.pt") as old, zipfile.ZipFile(packed, "w", 8) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    packed.replace(source / "model.pt")
    with pytest.raises(InputError, match="is compressed"):
        open_checkpoint(source)


def test_tensors_of_another_kind_are_refused_by_name(tmp_path: Path):
    name = "lm_head.weight"
    for tensor, message in (
        (MODEL[name].t(), r"strides \(1, 224\) of shape \(224, 353\) are not row-major"),
        (MODEL[name].double(), r"dtype torch\.float64"),
        (MODEL[name].to_sparse(), r"built by torch\._utils\._rebuild_sparse_tensor"),
    ):
        source = saved_alone(tmp_path / name, {**MODEL, name: tensor})
        with pytest.raises(InputError, match=message):
            open_checkpoint(source)


class MakeDirectory:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


def test_no_pickle_is_executed(saved: Path, tmp_path: Path):
    canary = tmp_path / "canary"
    torch.save(MakeDirectory(canary), tmp_path / "live.pt")
    torch.load(tmp_path / "live.pt", weights_only=False)
    canary.rmdir()
    values: list[object] = [
        MakeDirectory(canary),
        {"model": MakeDirectory(canary), **MODEL},
        {**MODEL, "lm_head.weight": MakeDirectory(canary)},
        {"args": MakeDirectory(canary), "checkpoint_version": 3.0, "model": dict(MODEL)},
    ]
    actor = copied(saved, tmp_path / "ranks")
    single = with_config(tmp_path / "single")
    legacy = tmp_path / "legacy" / "iter_0000001"
    (legacy / "mp_rank_00").mkdir(parents=True)
    places = (
        (actor, actor / rank_file(1)),
        (single, single / "model.pt"),
        (legacy, legacy / "mp_rank_00" / "model_optim_rng.pt"),
    )
    for value in values:
        for source, file in places:
            torch.save(value, file)
            try:
                inspect(source, DEFAULT)
                convert(source, tmp_path / "out", Options("hf", workers=1))
            except GptossError:
                pass
            assert not canary.exists()
            shutil.rmtree(tmp_path / "out", ignore_errors=True)


def test_a_rank_s_own_place_must_fit_its_data(saved: Path):
    """As where a mesh says another place than the data was cut for."""
    file = torch_saves.open_saved(saved / "fsdp2" / "actor", rank_file(2))
    assert isinstance(file.value, dict)
    (piece,) = torch_saves.pieces(file.value["model.layers.0.mlp.router.weight"], "here")
    assert (piece.start, piece.extent) == ((4, 0), (1, SHAPE.hidden))
    with pytest.raises(IntegrityError, match=r"has shape \(2, 224\) of \(5, 224\), its data"):
        file.chunk("router", replace(piece, extent=(2, SHAPE.hidden)))


def test_float32_is_rounded_only_when_asked(tmp_path: Path):
    source = with_config(tmp_path / "source")
    torch.save({name: tensor.float() for name, tensor in MODEL.items()}, source / "model.pt")
    with pytest.raises(InputError, match="--cast"):
        converted(source, tmp_path / "no")
    assert_is_the_model(converted(source, tmp_path / "out", cast=True))


def test_a_directory_without_config_asks_for_one(saved: Path, tmp_path: Path):
    torch.save(dict(MODEL), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"weights in files of torch\.save.*--config CONFIG_JSON"):
        open_checkpoint(tmp_path)
    config = saved / "fsdp2" / "actor" / "huggingface" / "config.json"
    assert open_checkpoint(tmp_path, Choices(config=config)).variant == "bf16"

"""GPTModel's own parameters by hand, and torch_dist directories by torch and megatron-core.

Shares no line with the tables: what transformers loaded is arranged, and cut for each rank, as
megatron-core's layers compute with it. No tests here. Usual calls::

    whole = gpt_model_parameters(SQUARE, loaded_by_transformers(directory))
    with single_process():
        model = build_gpt_oss(SQUARE, torch.bfloat16)
        load(model, iteration_dir)
        assert_parameters(model, whole)
        save(model, tmp_path / "iter_0000001", per_layer=True)
    write_cut(tmp_path / "iter_0000002", tensors, seed=1)      # uneven chunks
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Mapping
from itertools import pairwise, product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import filesystem, state_dict_saver
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)

from tests.megatron_cpu import Parallel
from tests.tiny_models import TinyShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel

_TENSOR_AXIS = {
    "word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "linear_qkv.weight": 0,
    "linear_qkv.bias": 0,
    "linear_proj.weight": 1,
    "core_attention.softmax_offset": 0,
}
"""The axis that tensor parallelism cuts; every other parameter outside the experts is whole."""


def loaded_by_transformers(directory: Path) -> dict[str, Tensor]:
    """The parameters of GptOssForCausalLM, decoded to BF16 by transformers where packed."""
    from transformers import GptOssForCausalLM

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = GptOssForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return dict(model.state_dict())


def gpt_model_parameters(shape: TinyShape, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The whole model under GPTModel's parameter names; `hf` holds HF BF16 names."""
    own = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
        "output_layer.weight": hf["lm_head.weight"],
    }
    for n in range(shape.layers):
        theirs, layer = f"model.layers.{n}", f"decoder.layers.{n}"
        own[f"{layer}.input_layernorm.weight"] = hf[f"{theirs}.input_layernorm.weight"]
        own[f"{layer}.pre_mlp_layernorm.weight"] = hf[f"{theirs}.post_attention_layernorm.weight"]
        sinks = hf[f"{theirs}.self_attn.sinks"]
        own[f"{layer}.self_attention.core_attention.softmax_offset"] = sinks
        for kind in ("weight", "bias"):
            # One group of rows per kv head: its query heads, then its key, then its value.
            groups = [
                hf[f"{theirs}.self_attn.{p}_proj.{kind}"].unflatten(0, (shape.kv_heads, -1))
                for p in "qkv"
            ]
            own[f"{layer}.self_attention.linear_qkv.{kind}"] = torch.cat(groups, 1).flatten(0, 1)
            out = hf[f"{theirs}.self_attn.o_proj.{kind}"]
            own[f"{layer}.self_attention.linear_proj.{kind}"] = out
            own[f"{layer}.mlp.router.{kind}"] = hf[f"{theirs}.mlp.router.{kind}"]
        for e in range(shape.experts):
            own |= _expert(f"{layer}.mlp.experts.local_experts.{e}", f"{theirs}.mlp.experts", e, hf)
    return own


def _expert(own: str, theirs: str, e: int, hf: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """fc1 `[2F, H]` is all gates, then all ups; Hugging Face alternates them, input-major."""
    rows, bias = hf[f"{theirs}.gate_up_proj"][e].T, hf[f"{theirs}.gate_up_proj_bias"][e]
    return {
        f"{own}.linear_fc1.weight": torch.cat((rows[0::2], rows[1::2])),
        f"{own}.linear_fc1.bias": torch.cat((bias[0::2], bias[1::2])),
        f"{own}.linear_fc2.weight": hf[f"{theirs}.down_proj"][e].T,
        f"{own}.linear_fc2.bias": hf[f"{theirs}.down_proj_bias"][e],
    }


def part_of_rank(
    shape: TinyShape, parallel: Parallel, whole: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What this rank's GPTModel holds, under its own numbers of layers and experts."""
    from megatron.core import parallel_state as state

    stage, layers = state.get_pipeline_model_parallel_rank(), shape.layers // parallel.pp
    group, experts = state.get_expert_model_parallel_rank(), shape.experts // parallel.ep
    tp = (state.get_tensor_model_parallel_rank(), parallel.tp)
    etp = (state.get_expert_tensor_parallel_rank() or 0, parallel.etp)
    here: dict[str, Tensor] = {}
    for name, tensor in whole.items():
        words = name.split(".")
        if "layers" in words:
            owner, layer = divmod(int(words[2]), layers)
            words[2] = str(layer)
        else:
            owner = 0 if words[0] == "embedding" else parallel.pp - 1
        if owner != stage:
            continue
        suffix = ".".join(words[-2:])
        if "local_experts" in words:
            place = words.index("local_experts") + 1
            owner, expert = divmod(int(words[place]), experts)
            words[place] = str(expert)
            if owner != group:
                continue
            here[".".join(words)] = _expert_part(suffix, tensor, *etp)
        else:
            axis = _TENSOR_AXIS.get(suffix, _TENSOR_AXIS.get(name))
            part = tensor if axis is None else tensor.chunk(tp[1], axis)[tp[0]]
            here[".".join(words)] = part
    return here


def _expert_part(suffix: str, tensor: Tensor, rank: int, size: int) -> Tensor:
    """fc1 is cut within each half, fc2's weight along its input; fc2's bias is whole."""
    if suffix.startswith("linear_fc1"):
        return torch.cat([half.chunk(size)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(size, 1)[rank] if suffix == "linear_fc2.weight" else tensor


def fill(model: GPTModel, parameters: Mapping[str, Tensor]) -> None:
    """Set every parameter of a model."""
    own = dict(model.named_parameters())
    assert own.keys() == parameters.keys()
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(parameters[name])


def assert_parameters(model: GPTModel, expected: Mapping[str, Tensor]) -> None:
    """Every parameter of the model, no more and no fewer, has the expected shape and bits."""
    assert_same({name: p.detach() for name, p in model.named_parameters()}, expected)


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The same names, shapes, dtypes and bits."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name].shape, found[name].dtype) == (tensor.shape, tensor.dtype), name
        assert torch.equal(_bits(found[name]), _bits(tensor)), name


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def safetensors_in(directory: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, read by the safetensors library."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def layout_metadata(*, per_layer: bool = False, per_expert: bool = False) -> dict[str, bool]:
    """What a checkpoint says about its naming, and what its loaders ask the model's names with."""
    metadata = {"singleton_local_shards": per_expert, "chained_optim_avoid_prefix": True}
    return metadata | ({"non_homogeneous_layers": True} if per_layer else {})


def load(model: GPTModel, path: Path, *, per_layer: bool = False) -> None:
    """Clear a model and fill it with megatron-core's loader, default strictness."""
    from megatron.core import dist_checkpointing

    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(float("nan"))
    wanted = model.sharded_state_dict(metadata=layout_metadata(per_layer=per_layer))
    loaded = dist_checkpointing.load({"model": wanted}, str(path))
    assert isinstance(loaded, dict)
    model.load_state_dict(loaded["model"], strict=False)


def save(
    model: GPTModel,
    path: Path,
    *,
    per_layer: bool = False,
    per_expert: bool = False,
    extra: Mapping[str, object] | None = None,
) -> None:
    """Save a model into an existing empty directory, with the entries of a training run beside."""
    from megatron.core import dist_checkpointing

    metadata = layout_metadata(per_layer=per_layer, per_expert=per_expert)
    state = {
        "model": model.sharded_state_dict(metadata=metadata),
        "checkpoint_version": 3.0,
        "iteration": 1,
        **(extra or {}),
    }
    dist_checkpointing.save(state, str(path), content_metadata=metadata)


def training_entries() -> dict[str, object]:
    """Sharded entries as an optimizer and the random states leave them; any world size."""
    from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
    from torch import distributed

    rank, world = distributed.get_rank(), distributed.get_world_size()
    moment = "optimizer.state.exp_avg.decoder.layers.mlp.router.weight"
    return {
        "optimizer": ShardedTensor.from_rank_offsets(moment, torch.ones(4), (0, rank, world)),
        "rng_state": ShardedObject("rng_state", [{"cuda": "state"}], (world,), (rank,)),
    }


class _CutPlanner(SavePlanner):
    """Saves every tensor in boxes with edges at random places, no two axes cut alike."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def set_up_planner(
        self,
        state_dict: dict[str, Tensor],
        storage_meta: object = None,
        is_coordinator: bool = True,
    ) -> None:
        self.tensors = state_dict

    def _edges(self, size: int) -> list[int]:
        cuts = self.random.sample(range(1, size), min(self.random.randint(0, 2), size - 1))
        return sorted({0, size, *cuts})

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.tensors.items():
            properties = TensorProperties.create_from_tensor(tensor)
            for box in product(*(pairwise(self._edges(size)) for size in tensor.shape)):
                start = torch.Size(lo for lo, _ in box)
                chunk = ChunkStorageMetadata(start, torch.Size(hi - lo for lo, hi in box))
                written = TensorWriteData(chunk, properties, tensor.shape)
                index = MetadataIndex(name, start)
                items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=written))
        return SavePlan(items)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        box = (slice(s, s + e) for s, e in zip(chunk.offsets, chunk.sizes, strict=True))
        return self.tensors[write_item.index.fqn][tuple(box)].clone()


def write_cut(
    iteration: Path,
    tensors: Mapping[str, Tensor],
    common: Mapping[str, object] | None = None,
    *,
    seed: int = 0,
) -> Path:
    """Write an iteration in uneven chunks with torch's writer; return the checkpoint's root."""
    iteration.mkdir(parents=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that no process group is initialised
        state_dict_saver.save(
            dict(tensors),
            storage_writer=filesystem.FileSystemWriter(iteration),
            planner=_CutPlanner(seed),
            no_dist=True,
        )
    finish(iteration, common or {})
    return iteration.parent


def finish(iteration: Path, common: Mapping[str, object]) -> None:
    """What stands beside the tensors: common state, declaration, tracker."""
    torch.save({"checkpoint_version": 3.0, "iteration": 1, **common}, iteration / "common.pt")
    backend = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    common_backend = {"common_backend": "torch", "common_backend_version": 1}
    (iteration / "metadata.json").write_text(json.dumps(backend | common_backend))
    tracker = iteration.parent / "latest_checkpointed_iteration.txt"
    tracker.write_text(str(int(iteration.name.removeprefix("iter_"))))

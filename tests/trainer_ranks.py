"""What trainers save with several ranks, by the libraries' own code: `python -m tests.trainer_ranks
FOLDER` makes every form in one launch, of one random model, on a CPU.

One process imports what is slow and forks four ranks that talk by gloo. Six experts on four ranks
leave the last without any, as 32 do on 24 GPUs.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from accelerate import FullyShardedDataParallelPlugin, PartialState
from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer
from safetensors.torch import save_file
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    ShardedStateDictConfig,
    StateDictType,
    fully_shard,
)
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes
from transformers import GptOssConfig, GptOssForCausalLM

from tests.odd_models import TINY

RANKS = 4
SHAPE: dict[str, Any] = {**TINY, "num_local_experts": 6, "intermediate_size": 20}


def model_of(seed: int) -> GptOssForCausalLM:
    """The same random model in every rank."""
    torch.manual_seed(seed)
    config = GptOssConfig(**SHAPE, architectures=["GptOssForCausalLM"])
    config._experts_implementation = "eager"
    model = GptOssForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.bfloat16()


class App(Stateful):
    """A model and its optimizer, as torch's tutorial of DCP wraps them."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer):
        self.model, self.optimizer = model, optimizer

    def state_dict(self) -> dict[str, Any]:
        """Both, under names without wrappers."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Never asked for."""
        raise NotImplementedError


def rank_main(rank: int, folder: Path) -> None:
    """Everything that one rank saves."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    # accelerate looks at these, though the processes know each other already.
    os.environ |= {"RANK": f"{rank}", "LOCAL_RANK": f"{rank}", "WORLD_SIZE": f"{RANKS}"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS
    )
    PartialState(cpu=True)
    accelerate_fsdp2(folder)
    mesh = init_device_mesh("cpu", (RANKS,))
    for seed, later in ((2, "-later"), (1, "")):
        plain = {name: tensor.detach() for name, tensor in model_of(seed).state_dict().items()}
        cut = {name: distribute_tensor(one, mesh, [Shard(0)]) for name, one in plain.items()}
        save(cut, checkpoint_id=folder / f"plain{later}")
        place = folder / f"shards{later}"
        place.mkdir(exist_ok=True)
        writer = HuggingFaceStorageWriter(str(place), save_distributed=True)
        save(cut, storage_writer=writer)
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "fsdp"))
    both = {
        name: distribute_tensor(
            one, square, [Shard(0), Shard(1)] if ".experts." in name else [Replicate(), Shard(0)]
        )
        for name, one in plain.items()
    }
    save({"model": both}, checkpoint_id=folder / "ep")
    rank_files(folder, rank)
    dist.destroy_process_group()


def rank_files(folder: Path, rank: int) -> None:
    """What verl's manager saves: `torch.save` of each rank's sharded state dict, under FSDP 2, with
    replicas, and under FSDP 1 with a mesh (DTensor) and without (ShardedTensor)."""
    line = init_device_mesh("cpu", (RANKS,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ddp", "fsdp"))
    for name, mesh in (("fsdp2", line), ("hsdp", square)):
        model = model_of(1)
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        save_rank(folder / name, rank, model.state_dict())
    for name, given in (("fsdp1-mesh", line), ("fsdp1", None)):
        wrapped = FullyShardedDataParallel(
            model_of(1), device_id=torch.device("cpu"), use_orig_params=True, device_mesh=given
        )
        FullyShardedDataParallel.set_state_dict_type(
            wrapped, StateDictType.SHARDED_STATE_DICT, ShardedStateDictConfig(offload_to_cpu=True)
        )
        save_rank(folder / name, rank, wrapped.state_dict())


def save_rank(folder: Path, rank: int, state: dict[str, Any]) -> None:
    """One rank's file."""
    (folder / "actor").mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / "actor" / f"model_world_size_{RANKS}_rank_{rank}.pt")


def accelerate_fsdp2(folder: Path) -> None:
    """FSDP 2 by accelerate's own functions of saving; a step of AdamW makes an optimizer's state.

    accelerate itself takes FSDP on a CPU for plain DDP, hence what stands for its Accelerator.
    """
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")
    rank = dist.get_rank()
    accelerator = SimpleNamespace(
        is_fsdp2=True,
        process_index=rank,
        is_main_process=not rank,
        num_processes=RANKS,
        wait_for_everyone=dist.barrier,
    )
    model = model_of(0)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(torch.arange(8)[None]).logits.float().sum().backward()
    optimizer.step()
    place = str(folder / "checkpoint-1")
    save_fsdp_model(plugin, accelerator, model, place)
    save_fsdp_optimizer(plugin, accelerator, optimizer, model, place)
    save({"app": App(model, optimizer)}, checkpoint_id=folder / "app")
    full = {name: one.full_tensor().contiguous() for name, one in model.state_dict().items()}
    if not rank:
        save_file(full, folder / "trained.safetensors")


def main() -> None:
    """Fork the ranks; write the model and its configuration beside what they save."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    model = model_of(1)
    model.config.save_pretrained(folder)
    tensors = {name: one.contiguous() for name, one in model.state_dict().items()}
    save_file(tensors, folder / "plain.safetensors")
    start_processes(rank_main, (folder,), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main()

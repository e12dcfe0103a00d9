"""What ranks of FSDP save with `torch.save`, made by torch itself without a launch.

torch's own classes cut and pickle every tensor; with its fake process group a forked child is a
rank, which is enough for what exchanges nothing. FSDP 1 gathers, so its two ways to cut a
gathered tensor are called as its state dict calls them.
"""

from __future__ import annotations

import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # Once, not in every child.
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

StateDict = Mapping[str, Any]
Way = Callable[[Mapping[str, Tensor], int, int], StateDict]
"""(tensors, rank, ranks) -> that rank's state dict."""


@contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    """Be one rank of a group that exchanges nothing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        try:
            yield
        finally:
            dist.destroy_process_group()


def module_of(tensors: Mapping[str, Tensor]) -> nn.Module:
    """Modules that hold these tensors under these names."""
    root = nn.Module()
    for name, tensor in tensors.items():
        *path, last = name.split(".")
        at = root
        for part in path:
            if part not in at._modules:
                at.add_module(part, nn.Module())
            at = at._modules[part]
            assert at is not None
        at.register_parameter(last, nn.Parameter(tensor.clone(), requires_grad=False))
    return root


def fsdp2(tensors: Mapping[str, Tensor], rank: int, world: int) -> StateDict:
    """FSDP 2, on all ranks."""
    module = module_of(tensors)
    fully_shard(module, mesh=init_device_mesh("cpu", (world,)))
    return module.state_dict()


def hsdp(tensors: Mapping[str, Tensor], rank: int, world: int) -> StateDict:
    """FSDP 2 on half the ranks, the other half holds the same."""
    module = module_of(tensors)
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ddp", "fsdp"))
    fully_shard(module, mesh=mesh)
    return module.state_dict()


def experts_apart(tensors: Mapping[str, Tensor], rank: int, world: int) -> StateDict:
    """Experts dealt to two halves of the ranks, each cut again along the next dimension."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("ep", "fsdp"))
    return {name: _apart(name, tensor, mesh) for name, tensor in tensors.items()}


def _apart(name: str, tensor: Tensor, mesh: DeviceMesh) -> DTensor:
    places = (Shard(0), Shard(1)) if ".experts." in name else (Replicate(), Shard(0))
    return distribute_tensor(tensor, mesh, places, src_data_rank=None)


def sharded(tensors: Mapping[str, Tensor], rank: int, world: int) -> StateDict:
    """FSDP 1 without a mesh: ShardedTensor."""
    from torch.distributed.fsdp._shard_utils import _create_chunk_sharded_tensor

    group = dist.distributed_c10d._get_default_group()
    return {
        name: _create_chunk_sharded_tensor(tensor, rank, world, world, group)
        for name, tensor in tensors.items()
    }


WAYS: dict[str, Way] = {
    "fsdp2": fsdp2,
    "hsdp": hsdp,
    "experts_apart": experts_apart,
    "sharded": sharded,
}


def save_ranks(
    folder: Path, tensors: Mapping[str, Tensor], way: str, world: int, name: str = ""
) -> Path:
    """Save every rank's state dict as verl does, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    name = name or "model_world_size_{world}_rank_{rank}.pt"
    for rank in range(world):
        # A process for each: torch keeps what it knows of a mesh for as long as a process lives.
        child = os.fork()
        if child == 0:
            try:
                torch.set_num_threads(1)
                with as_rank(rank, world):
                    state = WAYS[way](tensors, rank, world)
                    torch.save(state, folder / name.format(world=world, rank=rank))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0, f"{way}: rank {rank}"
    return folder

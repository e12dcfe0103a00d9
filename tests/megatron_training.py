"""Training runs of megatron-core's own GPT-OSS on a CPU, saved as a trainer saves. No tests here.

Model, data-parallel wrapper, schedules, mixed-precision Adam and saver are megatron-core's; what
lies beside the weights follows Megatron-LM's `generate_state_dict` and `get_rng_state`
(training/checkpointing.py). Two ranks over gloo run one configuration after another::

    run_ranks(2, train, folder, SHAPE, RUNS, args)    # folder/first.pt: the first weights

Each run leaves a checkpoint and, of every rank, the parameters that its memory held at the end.
"""

from __future__ import annotations

import contextlib
import random
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tests.megatron_cpu import Parallel, build_gpt_oss, model_parallel
from tests.tiny_models import TinyShape

if TYPE_CHECKING:
    from megatron.core.dist_checkpointing import ShardedObject
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

STEPS, BATCH, SEQUENCE = 2, 2, 24


@dataclass(frozen=True)
class Run:
    """One training run: how it is cut, which optimizer it has, and what it leaves out."""

    parallel: Parallel
    distributed: bool = False
    """Whether the optimizer's state is distributed over the data-parallel ranks."""
    reshardable: bool = False
    """Whether that state is saved under the names of parameters, or as it lies."""
    padded: int | None = None
    """Rows of the vocabulary with its padding, None without any."""
    frozen: str | None = None
    """A part of the names of parameters that do not train."""
    keys: str = "te"
    """Whose spec names the norm before the experts in the checkpoint."""
    asynchronous: bool = False
    """Whether the files are written by a process beside the training."""


class Engine(Enum):
    """A class of a trainer's own, as every trainer keeps some among its arguments."""

    OURS = 1


class _NoCuda(TorchFunctionMode):
    """Runs on the CPU what asks for a CUDA tensor, and calls CPU tensors CUDA's, as asked for."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        if func is Tensor.cuda:
            return args[0]
        found = func(*args, **options)
        if func is Tensor.type and isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found


@contextlib.contextmanager
def _no_cuda() -> Iterator[None]:
    from megatron.core.tensor_parallel import layers

    with _NoCuda(), contextlib.ExitStack() as stack:
        for name in ("Stream", "Event"):
            stack.enter_context(mock.patch.object(torch.cuda, name, _Nothing))
        for name in ("current_stream", "default_stream", "stream", "empty_cache"):
            stack.enter_context(mock.patch.object(torch.cuda, name, _Nothing))
        # 0.16.1 adds each expert's bias in place to what autograd takes for a view of an input.
        reduce = layers.reduce_from_tensor_model_parallel_region
        apart = lambda found, group=None: reduce(found, group).clone()  # noqa: E731
        name = "reduce_from_tensor_model_parallel_region"
        stack.enter_context(mock.patch.object(layers, name, apart))
        yield


class _Nothing:
    """Stands for a CUDA stream: there is one order of things on a CPU."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> _Nothing:
        return self

    def __exit__(self, *_: object) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_, **__: None


def train(folder: Path, shape: TinyShape, runs: Mapping[str, Run], args: Mapping[str, Any]) -> None:
    """In every rank: train each run from the same weights, save it, and leave what memory holds."""
    first: dict[str, Tensor] = torch.load(folder / "first.pt")
    with _no_cuda():
        for name, run in runs.items():
            with model_parallel(run.parallel):
                _train(folder / name, shape, run, first, args)


def _train(
    folder: Path,
    shape: TinyShape,
    run: Run,
    first: Mapping[str, Tensor],
    args: Mapping[str, Any],
) -> None:
    from torch import distributed

    chunks = _model(shape, run, first)
    optimizer = _optimizer(chunks, run)
    scheduler = _scheduler(optimizer)
    before = [_parameters(chunk) for chunk in chunks]
    for step in range(STEPS):
        _step(chunks, optimizer, shape, step)
        scheduler.step(increment=BATCH)
    after = [_parameters(chunk) for chunk in chunks]
    for old, new in zip(before, after, strict=True):
        _assert_trained(old, new, run.frozen)
    if distributed.get_rank() == 0:
        (folder / f"iter_{STEPS:07d}").mkdir(parents=True)
    distributed.barrier()
    _save(folder, chunks, optimizer, scheduler, run, args)
    where = _places(shape, run)
    held = {where(part, n): w for part, own in enumerate(after) for n, w in own.items()}
    torch.save(held, folder / f"memory-{distributed.get_rank()}.pt")


def _model(
    shape: TinyShape, run: Run, first: Mapping[str, Tensor]
) -> list[DistributedDataParallel]:
    """This rank's parts, filled with the first weights; padding rows are random, as trained."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module

    shape = replace(shape, vocab=run.padded or shape.vocab)
    where = _places(shape, run)
    chunks: list[DistributedDataParallel] = []
    for part in range(run.parallel.vpp):
        place = part if run.parallel.vpp > 1 else None
        model = build_gpt_oss(shape, torch.bfloat16, keys=run.keys, part=place)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                weight = first[where(part, name)]
                parameter[: len(weight)].copy_(weight)
                parameter.requires_grad = not (run.frozen and run.frozen in name)
        ddp = DistributedDataParallelConfig(
            use_distributed_optimizer=run.distributed, grad_reduce_in_fp32=True
        )
        model.config.bf16 = True
        wrapped = Float16Module(model.config, model)
        chunks.append(DistributedDataParallel(model.config, ddp, wrapped))
    return chunks


def _places(shape: TinyShape, run: Run) -> Callable[[int, str], str]:
    """The name in the whole model of what this rank's part calls so."""
    from megatron.core import parallel_state as state

    stage, stages = state.get_pipeline_model_parallel_rank(), run.parallel.pp
    layers = shape.layers // (stages * run.parallel.vpp)
    experts = shape.experts // run.parallel.ep
    group = state.get_expert_model_parallel_rank()

    def place(part: int, name: str) -> str:
        words = name.split(".")
        if "layers" in words:
            words[2] = str(int(words[2]) + (part * stages + stage) * layers)
        if "local_experts" in words:
            at = words.index("local_experts") + 1
            words[at] = str(int(words[at]) + group * experts)
        return ".".join(words)

    return place


def _parameters(chunk: DistributedDataParallel) -> dict[str, Tensor]:
    return {
        name.removeprefix("module.module."): parameter.detach().clone()
        for name, parameter in chunk.named_parameters()
    }


def _assert_trained(
    old: Mapping[str, Tensor], new: Mapping[str, Tensor], frozen: str | None
) -> None:
    for name, weight in old.items():
        held = bool(frozen and frozen in name)
        assert torch.equal(weight, new[name]) == held, name


def _optimizer(chunks: list[DistributedDataParallel], run: Run) -> MegatronOptimizer:
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    config = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        min_lr=0.01,
        weight_decay=0.01,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=run.distributed,
        clip_grad=1.0,
    )
    return get_megatron_optimizer(config, list(chunks))


def _scheduler(optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=0.01,
        min_lr=0.01,
        lr_warmup_steps=0,
        lr_decay_steps=1000,
        lr_decay_style="constant",
        start_wd=0.01,
        end_wd=0.01,
        wd_incr_steps=1000,
        wd_incr_style="constant",
    )


def _step(
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    shape: TinyShape,
    step: int,
) -> None:
    """One step of the schedule that Megatron-LM takes, on tokens that each rank draws alike."""
    from megatron.core import parallel_state as state
    from megatron.core.distributed import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    draws = torch.Generator().manual_seed(1000 * step + state.get_data_parallel_rank())
    microbatches = state.get_pipeline_model_parallel_world_size()
    # Every stage draws every microbatch, in the order in which its parts take them.
    batches = [
        torch.randint(0, shape.vocab, (BATCH, SEQUENCE + 1), generator=draws)
        for _ in range(microbatches)
    ]

    def forward(data: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, object]:
        tokens = next(data)
        positions = torch.arange(SEQUENCE)[None].expand(BATCH, -1)
        found = model(tokens[:, :-1].contiguous(), positions, None, labels=tokens[:, 1:])

        def loss(output: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            mean = output.float().mean()
            return mean, {"loss": mean.detach()}

        return found, loss

    for chunk in chunks:
        chunk.zero_grad_buffer()
        chunk.config.finalize_model_grads_func = finalize_model_grads
    optimizer.zero_grad()
    run = get_forward_backward_func()
    run(
        forward_step_func=forward,
        data_iterator=[iter(batches) for _ in chunks],
        model=list(chunks),
        num_microbatches=microbatches,
        seq_length=SEQUENCE,
        micro_batch_size=BATCH,
        forward_only=False,
    )
    done: Any = optimizer.step()
    succeeded, norm, _ = done
    assert succeeded and norm


def _save(
    folder: Path,
    chunks: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    run: Run,
    args: Mapping[str, Any],
) -> None:
    """What Megatron-LM's `save_checkpoint` does for `--ckpt-format torch_dist`."""
    from megatron.core import dist_checkpointing
    from megatron.core import parallel_state as state
    from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
    from megatron.core.dist_checkpointing.strategies.fully_parallel import (
        FullyParallelSaveStrategyWrapper,
    )
    from megatron.core.rerun_state_machine import get_rerun_state_machine
    from torch import distributed

    group: Any = state.get_data_parallel_group(with_context_parallel=True)
    metadata: dict[str, Any] = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if run.distributed:
        kind = "fully_reshardable" if run.reshardable else "dp_reshardable"
        metadata["distrib_optim_sharding_type"] = kind
        if run.reshardable:
            metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    metadata["dp_cp_group"] = group
    names = ["model"] if len(chunks) == 1 else [f"model{n}" for n in range(len(chunks))]
    content: dict[str, Any] = {
        "args": Namespace(**{**args, **_sizes(run), "engine": Engine.OURS}),
        "checkpoint_version": 3.0,
        "iteration": STEPS,
    }
    for name, chunk in zip(names, chunks, strict=True):
        bare: Any = chunk.module.module
        content[name] = bare.sharded_state_dict(metadata=metadata)
    content["optimizer"] = optimizer.sharded_state_dict(content, metadata=metadata)
    content["opt_param_scheduler"] = scheduler.state_dict()
    content["rerun_state_machine"] = get_rerun_state_machine().state_dict(
        data_iterator=None, ckpt_format="torch_dist"
    )
    content["rng_state"] = _rng_state(run)
    content["num_floating_point_operations_so_far"] = 0
    strategy = get_default_save_sharded_strategy("torch_dist")
    request = dist_checkpointing.save(
        content,
        str(folder / f"iter_{STEPS:07d}"),
        FullyParallelSaveStrategyWrapper(strategy, group, False),
        async_sharded_save=run.asynchronous,
        content_metadata={k: v for k, v in metadata.items() if k != "dp_cp_group"},
    )
    if run.asynchronous:
        assert request is not None
        request.execute_sync()
    distributed.barrier()
    if distributed.get_rank() == 0:
        (folder / "latest_checkpointed_iteration.txt").write_text(str(STEPS))


def _rng_state(run: Run) -> ShardedObject:
    from megatron.core import parallel_state as state
    from megatron.core.dist_checkpointing import ShardedObject

    states = {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "cuda_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
    }
    pipeline = state.get_pipeline_model_parallel_rank()
    data = state.get_data_parallel_rank(with_context_parallel=True)
    if run.parallel.ep == 1:
        place = (run.parallel.pp, 1), (pipeline, 0)
        return ShardedObject("rng_state", [states], *place, replica_id=data)
    ranks = state.get_data_parallel_world_size(with_context_parallel=True)
    place = (run.parallel.pp, 1, ranks), (pipeline, 0, data)
    return ShardedObject("rng_state", [states], *place)


def _sizes(run: Run) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": run.parallel.tp,
        "pipeline_model_parallel_size": run.parallel.pp,
        "virtual_pipeline_model_parallel_size": run.parallel.vpp if run.parallel.vpp > 1 else None,
        "expert_model_parallel_size": run.parallel.ep,
        "expert_tensor_parallel_size": run.parallel.etp,
        "use_distributed_optimizer": run.distributed,
        **({"padded_vocab_size": run.padded} if run.padded else {}),
    }

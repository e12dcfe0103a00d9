"""megatron-core's own GPT-OSS model on CPU: built, saved and loaded by its own code. No tests here.

Five places of megatron-core 0.16.1 ask for a CUDA device (or, without TransformerEngine, for a
name that is not defined); `cpu_megatron` replaces them for as long as it lasts. None of them
changes the maths. Usual calls::

    with single_process():
        model = build_gpt_oss(SQUARE, torch.float32)
        load_directory(model, iteration_dir)

    run_ranks(4, function, *args)      # function(*args) in 4 processes; there:
    with model_parallel(Parallel(tp=2, ep=2)):
        model = build_gpt_oss(SQUARE, torch.float32)
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING
from unittest import mock

import torch
from torch.multiprocessing.spawn import start_processes

from tests.tiny_models import TinyShape

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig

os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")

_PRELOADED = [
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.optimizer",
    "megatron.core.tensor_parallel",
]


@dataclass(frozen=True)
class Parallel:
    """Sizes of the tensor, pipeline, expert and expert-tensor groups; the rest is data parallel.

    With `vpp` above 1 each pipeline rank holds so many parts of the model."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    vpp: int = 1

    @property
    def label(self) -> str:
        return "-".join(f"{k}{v}" for k, v in vars(self).items() if v > 1) or "single"


PARALLEL = (
    Parallel(tp=2),
    Parallel(pp=2),
    Parallel(ep=2),
    Parallel(tp=2, ep=2, etp=2),
    Parallel(tp=2, pp=2, ep=2),
)
"""Layouts that four processes can form and two kv heads can be split into."""


@contextlib.contextmanager
def cpu_megatron() -> Iterator[None]:
    """Let megatron-core run, save and load without CUDA; its warnings are silenced meanwhile."""
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        import torch._dynamo
        from megatron.core.fusions import fused_softmax
        from megatron.core.transformer import dot_product_attention
        from megatron.core.transformer.moe import moe_utils

        def patch(target: object, name: str, value: object, create: bool = False) -> None:
            stack.enter_context(mock.patch.object(target, name, value, create=create))

        patch(torch._dynamo.config, "disable", True)
        patch(torch.cuda, "current_device", lambda: torch.device("cpu"))
        patch(torch.cuda, "synchronize", lambda *_: None)
        patch(moe_utils, "te_general_gemm", None, create=True)
        for name in ("get_default_causal_mask", "get_sliding_window_causal_mask"):
            patch(fused_softmax, name, _made_on_cpu(getattr(fused_softmax, name)))
        patch(dot_product_attention.tensor_parallel, "get_cuda_rng_tracker", _NoRandomState)
        yield


class _NoRandomState:
    """Stands for the CUDA random states that dropout forks; dropout is zero here."""

    def fork(self, name: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def is_initialized(self) -> bool:
        return False


def _made_on_cpu(mask: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """megatron-core's own mask function, where it says `torch.ones(..., device="cuda")`."""
    ones = torch.ones

    def made(*args: object) -> torch.Tensor:
        on_cpu = lambda *size, device=None, **options: ones(*size, **options)  # noqa: E731
        with mock.patch.object(torch, "ones", on_cpu):
            return mask(*args)

    return made


@contextlib.contextmanager
def single_process() -> Iterator[None]:
    """A process group of this process alone, with megatron-core's groups of one."""
    with (
        tempfile.TemporaryDirectory() as folder,
        _process_group(Path(folder) / "store", 0, 1),
        model_parallel(Parallel()),
    ):
        yield


@contextlib.contextmanager
def _process_group(store: Path, rank: int, world: int) -> Iterator[None]:
    import torch.distributed as dist

    with cpu_megatron():
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
        try:
            yield
        finally:
            dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel(parallel: Parallel) -> Iterator[None]:
    """megatron-core's process groups for one layout; every rank of the world must enter."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp,
        pipeline_model_parallel_size=parallel.pp,
        virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
    )
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()


def run_ranks(world: int, function: Callable[..., None], *args: object) -> None:
    """Run a module-level function in `world` processes that form a gloo process group.

    They are forked from one that has imported what takes long, once for all tests of a process.
    """
    get_context("forkserver").set_forkserver_preload(_PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank_main,
            (world, Path(folder) / "store", function, args),
            nprocs=world,
            start_method="forkserver",
        )


def _rank_main(
    rank: int, world: int, store: Path, function: Callable[..., None], args: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    with _process_group(store, rank, world):
        function(*args)


def build_gpt_oss(
    shape: TinyShape, dtype: torch.dtype, *, keys: str = "te", part: int | None = None
) -> GPTModel:
    """Return this rank's part of a GPT-OSS model of the local spec, random weights.

    `keys="te"` names the norm before the experts as TransformerEngine's spec does in a
    checkpoint (`decoder.layers.pre_mlp_layernorm.weight`), `keys="local"` as the local spec does.
    `part` is the one of a virtual pipeline.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

    config = _config(shape, dtype)
    spec = get_gpt_layer_local_spec(
        num_experts=shape.experts, moe_grouped_gemm=False, normalization="RMSNorm"
    )
    if keys == "te":
        assert isinstance(spec.submodules, TransformerLayerSubmodules)
        del spec.submodules.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    place = {} if part is None else {"ignore_virtual": False, "vp_stage": part}
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=shape.vocab,
        max_sequence_length=4096,
        pre_process=parallel_state.is_pipeline_first_stage(**place),
        post_process=parallel_state.is_pipeline_last_stage(**place),
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="yarn",
        rotary_base=int(shape.rope_theta),
        vp_stage=part,
    ).to(dtype)


def _config(shape: TinyShape, dtype: torch.dtype) -> TransformerConfig:
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.inter,
        moe_ffn_hidden_size=shape.inter,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_heads,
        kv_channels=shape.head_dim,
        num_moe_experts=shape.experts,
        moe_router_topk=4,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        normalization="RMSNorm",
        layernorm_epsilon=1e-5,
        gated_linear_unit=True,
        activation_func=quick_gelu,
        activation_func_clamp_value=7.0,
        glu_linear_offset=1.0,
        add_bias_linear=True,
        add_qkv_bias=True,
        softmax_type="learnable",
        window_size=(shape.window - 1, 0),
        window_attn_skip_freq=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        tensor_model_parallel_size=parallel_state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=(
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
    )
    # Set late: the constructor of 0.16.1 refuses expert biases together with expert tensor
    # parallelism. Loading and saving them is defined all the same.
    etp = parallel_state.get_expert_tensor_parallel_world_size()
    config.expert_tensor_parallel_size = etp
    # Read by GPTModel with getattr: no fields of megatron-core's own config class.
    for name, value in {
        "yarn_rotary_scaling_factor": shape.rope_factor,
        "yarn_original_max_position_embeddings": shape.original_length,
        "yarn_beta_fast": shape.beta_fast,
        "yarn_beta_slow": 1.0,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": False,
    }.items():
        setattr(config, name, value)
    return config


def load_directory(model: GPTModel, path: Path) -> None:
    """Fill a model from an iteration directory with megatron-core's loader, default strictness."""
    from megatron.core import dist_checkpointing

    loaded = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(path))
    assert isinstance(loaded, dict)
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    foreign = [key for key in (*missing, *unexpected) if not key.endswith("_extra_state")]
    if foreign:
        raise AssertionError(f"keys that do not match: {foreign}")


def save_directory(model: GPTModel, path: Path) -> None:
    """Save a model into an existing empty directory with megatron-core's saver."""
    from megatron.core import dist_checkpointing

    state = {"model": model.sharded_state_dict(), "checkpoint_version": 3.0, "iteration": 1}
    dist_checkpointing.save(state, str(path))


def logits(model: GPTModel, tokens: torch.Tensor) -> torch.Tensor:
    """Return the model's logits [sequence, vocab] for token ids [sequence]; one process only."""
    model.eval()
    positions = torch.arange(len(tokens))[None]
    with torch.no_grad():
        return model(tokens[None], positions, None)[0]

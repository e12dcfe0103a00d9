"""Oracle: the logits that megatron-core's own GPTModel gives for a torch_dist directory.

megatron-core loads the directory with `dist_checkpointing` and runs its local layer spec. It shares
no line with readers, forward pass or tables; only the numbers of the model are handed in.
Five places of megatron-core 0.16 ask for CUDA or for TransformerEngine; they are replaced while the
oracle runs, and none of them changes the arithmetic.
"""

from __future__ import annotations

import functools
import json
import os
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from gptoss_convert.containers import Chunk, torch_dist
from gptoss_convert.containers.torch_dist import metadata
from gptoss_convert.containers.torch_dist.files import open_file
from gptoss_convert.containers.torch_dist.metadata import StoredTensor
from gptoss_convert.errors import IntegrityError, UsageError
from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.private import private_copy

if TYPE_CHECKING:
    from megatron.core.models.gpt import GPTModel
    from megatron.core.transformer import TransformerConfig


def megatron_logits(
    iteration: Path,
    config: ModelConfig,
    sequences: Sequence[Sequence[int]],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    chunks: Sequence[Chunk] = (),
) -> list[Tensor]:
    """Logits `[S, V]` of each sequence by megatron-core's GPTModel, loaded from `iteration`.

    megatron-core unpickles what it loads: it is given a `.metadata` written here, of tensors alone,
    and the files in which `chunks` were found.
    Raises IntegrityError if the directory lacks a weight the model has, UsageError inside a
    distributed run: the oracle forms a process group of its own.
    """
    if distributed.is_initialized():
        raise UsageError("the megatron oracle expects no process group, found one")
    with _single_process(), _without_cuda_extensions(device):
        model = _build(config, dtype)
        with _private_iteration(iteration, chunks) as place:
            _load(model, place, iteration)
        model.to(device).eval()
        results = []
        with torch.inference_mode():
            for sequence in sequences:
                tokens = torch.tensor([list(sequence)], device=device)
                positions = torch.arange(len(sequence), device=device).unsqueeze(0)
                results.append(model(tokens, positions, None)[0].float())
        return results


@contextmanager
def _single_process() -> Iterator[None]:
    """A process group of one, with megatron-core's groups of one inside."""
    os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state

        store = distributed.HashStore()  # pyright: ignore[reportPrivateImportUsage]
        distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            parallel_state.initialize_model_parallel()
            yield
        finally:
            parallel_state.destroy_model_parallel()
            distributed.destroy_process_group()


@contextmanager
def _without_cuda_extensions(device: torch.device) -> Iterator[None]:
    """Let megatron-core run without TransformerEngine, and on a CPU without CUDA."""
    import torch._dynamo
    from megatron.core.fusions import fused_softmax
    from megatron.core.transformer import dot_product_attention
    from megatron.core.transformer.moe import moe_utils

    with ExitStack() as stack:
        replace = functools.partial(_replace, stack)
        replace(torch._dynamo.config, "disable", True)
        # 0.16.1 uses this name without defining it where TransformerEngine is missing.
        replace(moe_utils, "te_general_gemm", None)
        replace(dot_product_attention.tensor_parallel, "get_cuda_rng_tracker", _NoDropoutStates)
        if device.type == "cpu":
            replace(torch.cuda, "current_device", lambda: device)
            replace(torch.cuda, "synchronize", lambda *_: None)
            for name in ("get_default_causal_mask", "get_sliding_window_causal_mask"):
                replace(fused_softmax, name, _on_cpu(getattr(fused_softmax, name)))
        yield


def _replace(stack: ExitStack, owner: object, name: str, value: object) -> None:
    """Set an attribute until `stack` closes, then restore or remove it."""
    if hasattr(owner, name):
        stack.callback(setattr, owner, name, getattr(owner, name))
    else:
        stack.callback(delattr, owner, name)
    setattr(owner, name, value)


class _NoDropoutStates:
    """Stands for the random states that attention forks for its dropout, which is 0 here."""

    def fork(self, name: str = "") -> AbstractContextManager[None]:
        return nullcontext()

    def is_initialized(self) -> bool:
        return False


def _on_cpu(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """megatron-core's mask function, with its `torch.ones(..., device="cuda")` made on the CPU."""
    ones = torch.ones

    def made(*sizes: object) -> Tensor:
        with ExitStack() as stack:
            _replace(
                stack, torch, "ones", lambda *size, **kw: ones(*size, **kw | {"device": "cpu"})
            )
            return mask(*sizes)

    return made


def _build(config: ModelConfig, dtype: torch.dtype) -> GPTModel:
    """The model with megatron-core's local layer spec and no weights yet, on the CPU."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    spec = get_gpt_layer_local_spec(num_experts=config.experts, normalization="RMSNorm")
    return GPTModel(
        config=_transformer_config(config, dtype),
        transformer_layer_spec=spec,
        vocab_size=config.vocab,
        max_sequence_length=int(config.rope_original_length * config.rope_factor),
        parallel_output=False,
        share_embeddings_and_output_weights=False,
        position_embedding_type="yarn",
        rotary_base=int(config.rope_theta),
    ).to(dtype)


def _transformer_config(config: ModelConfig, dtype: torch.dtype) -> TransformerConfig:
    from megatron.core.fusions.fused_bias_geglu import quick_gelu
    from megatron.core.transformer import TransformerConfig

    options = TransformerConfig(
        num_layers=len(config.sliding),
        hidden_size=config.hidden,
        ffn_hidden_size=config.inter,
        moe_ffn_hidden_size=config.inter,
        num_attention_heads=config.heads,
        num_query_groups=config.kv_heads,
        kv_channels=config.head_dim,
        num_moe_experts=config.experts,
        moe_router_topk=config.experts_per_token,
        moe_router_load_balancing_type="none",
        moe_token_dispatcher_type="allgather",
        normalization="RMSNorm",
        layernorm_epsilon=config.norm_eps,
        gated_linear_unit=True,
        activation_func=quick_gelu,
        activation_func_clamp_value=config.swiglu_limit,
        glu_linear_offset=1.0,
        add_bias_linear=True,
        add_qkv_bias=True,
        softmax_type="learnable",
        window_size=(config.window - 1, 0),
        window_attn_skip_freq=[int(windowed) for windowed in config.sliding],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        gradient_accumulation_fusion=False,
        use_cpu_initialization=True,
        perform_initialization=False,
        params_dtype=dtype,
    )
    # GPTModel reads these with getattr; megatron-core's config class has no such fields.
    yarn = {
        "yarn_rotary_scaling_factor": config.rope_factor,
        "yarn_original_max_position_embeddings": config.rope_original_length,
        "yarn_beta_fast": config.rope_beta_fast,
        "yarn_beta_slow": config.rope_beta_slow,
        "yarn_mscale": None,
        "yarn_mscale_all_dim": None,
        "yarn_correction_range_round_to_int": config.rope_truncate,
    }
    for name, value in yarn.items():
        setattr(options, name, value)
    return options


@contextmanager
def _private_iteration(iteration: Path, chunks: Sequence[Chunk]) -> Iterator[Path]:
    """The iteration's tensors, and no object of it, as a checkpoint of its own."""
    chunks = chunks or torch_dist.read(iteration).chunks
    held = {chunk.tensor for chunk in chunks}
    with open_file(iteration, ".metadata") as file:
        found = metadata.parse(file.read_at(0, file.size), str(iteration / ".metadata"))
    tensors = [tensor for tensor in found.tensors if tensor.name in held]
    stated = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
    stated |= {"common_backend": "torch", "common_backend_version": 1}
    common = BytesIO()
    torch.save({}, common)
    written = {
        ".metadata": pickle.dumps(_dcp_metadata(tensors)),
        "common.pt": common.getvalue(),
        "metadata.json": json.dumps(stated).encode(),
    }
    with private_copy(iteration, chunks, written) as place:
        yield place


def _dcp_metadata(tensors: Sequence[StoredTensor]) -> Metadata:
    """torch's own metadata of these tensors, made anew."""
    state: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for tensor in tensors:
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype.removeprefix("torch.")))
        boxes = [(torch.Size(box.start), torch.Size(box.extent)) for box in tensor.items]
        state[tensor.name] = TensorStorageMetadata(
            properties, torch.Size(tensor.shape), [ChunkStorageMetadata(*box) for box in boxes]
        )
        for (start, _), item in zip(boxes, tensor.items.values(), strict=True):
            places[MetadataIndex(tensor.name, start)] = _StorageInfo(
                item.file, item.offset, item.length
            )
    return Metadata(state, storage_data=places)


def _load(model: GPTModel, place: Path, iteration: Path) -> None:
    """Fill the model through megatron-core's distributed loader."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor
    from megatron.core.dist_checkpointing.validation import StrictHandling

    # Objects, pickled as they are, hold no weights and are not asked for.
    asked = model.sharded_state_dict().items()
    sharded = {name: one for name, one in asked if not isinstance(one, ShardedObject)}
    for tensor in sharded.values():
        # Released layouts carry the name of TransformerEngine's spec, the local spec its own.
        if isinstance(tensor, ShardedTensor):
            tensor.key = tensor.key.replace(
                "mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight"
            )
    loaded = dist_checkpointing.load(
        {"model": sharded}, str(place), strict=StrictHandling.RETURN_ALL
    )
    assert isinstance(loaded, tuple)
    # megatron-core calls unexpected what the model asks for and the directory lacks.
    state, _, unexpected = loaded
    absent = sorted(name for name in unexpected if "_extra_state" not in name)
    if absent:
        raise IntegrityError(f"{iteration}: megatron-core misses {', '.join(absent)}")
    unfilled, foreign = model.load_state_dict(state["model"], strict=False)
    wrong = [name for name in (*unfilled, *foreign) if not name.endswith("_extra_state")]
    if wrong:
        raise IntegrityError(f"{iteration}: megatron-core cannot place {', '.join(wrong)}")

"""Megatron-Bridge's adapter checkpoints: what run_config.yaml says, and a known permutation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.adapters.resolve import Resolved, Tensors, resolve
from gptoss_convert.formats.adapters.stored import Stored
from gptoss_convert.formats.adapters.tables import load_adapter_table

_TARGETS = {
    "megatron.bridge.peft.lora.LoRA": "LoRA",
    "megatron.bridge.peft.canonical_lora.CanonicalLoRA": "canonical LoRA",
}
_HARMLESS = frozenset(
    (
        *("_target_", "dim", "alpha", "target_modules", "exclude_modules", "canonical_mapping"),
        *("dropout", "dropout_position", "lora_A_init_method", "lora_B_init_method", "lora_dtype"),
        *("a2a_experimental", "sequence_parallel_input_regather", "normalize_moe_lora"),
        *("share_expert_adapters", "experts_shared_outer_loras", "params_to_save"),
    )
)
_EXPERTS = ".mlp.experts.experts.linear_fc"
_PERMUTED = (
    ".linear_fc1.adapter.adapter_gate.linear_out.weight",
    ".linear_fc1.adapter.adapter_up.linear_out.weight",
)


def alpha(stored: Stored) -> float:
    """The strength; the scale of an update is this by the rank of its own tensors.

    Raises InputError naming what is no LoRA or not known.
    """
    config, where = stored.config, stored.where
    kind = config.get("_target_")
    if kind not in _TARGETS:
        known = " and ".join(_TARGETS.values())
        raise InputError(f"{where}: _target_ is {kind!r:.80}: only {known} can be merged")
    for key, value in config.items():
        if value and key not in _HARMLESS:
            raise InputError(
                f"{where}: {key!r:.80} is {value!r:.80}: this version does not know what it "
                "changes, so it cannot be merged"
            )
    value = config.get("alpha")
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < abs(value) < 1e6:
        raise InputError(f"{where}: alpha is {value!r:.80}, expects a number other than 0")
    return value


def resolved(stored: Stored, sizes: Mapping[str, int]) -> tuple[str, Resolved]:
    """The naming, and all tensors by it; raises IntegrityError for one that does not fit."""
    table = load_adapter_table("bridge")
    tensors = unpermuted(stored, sizes)
    found = {variant: resolve(table, variant, tensors, sizes) for variant in table.variants}
    variant = min(found, key=lambda one: len(found[one].unfit))
    if found[variant].unfit:
        raise IntegrityError(f"{stored.root}: {found[variant].unfit[0]}")
    return variant, found[variant]


def notes(stored: Stored, tensors: Tensors) -> list[str]:
    """What a user should know: expert adapters that differed between ranks are saved once only."""
    size = _parallel(stored).get("expert_model_parallel_size", 1)
    experts = [chunks[0] for name, chunks in tensors.items() if _EXPERTS in name]
    shared = any(len(chunk.shape) == 2 + (".layers.{" not in chunk.tensor) for chunk in experts)
    if size > 1 and experts and shared:
        return [
            f"trained with expert parallelism {size}: where all experts share an adapter, each "
            "rank trained one of its own, and Megatron-Bridge saved only one of them"
        ]
    return []


def unpermuted(stored: Stored, sizes: Mapping[str, int]) -> dict[str, tuple[Chunk, ...]]:
    """The tensors with the canonical gate's and up's rows where they belong.

    Under tensor parallelism Bridge saves each rank's rows as if they were gate and up halves: the
    file has (half, rank, row), the truth is (rank, half, row).
    """
    result: dict[str, tuple[Chunk, ...]] = {}
    for name, chunks in stored.tensors.items():
        permuted = name.endswith(_PERMUTED)
        result[name] = _unpermuted(stored, chunks, sizes["inter"]) if permuted else chunks
    return result


def _unpermuted(stored: Stored, chunks: Sequence[Chunk], inter: int) -> tuple[Chunk, ...]:
    axis = len(chunks[0].shape) - 2
    lengths = {chunk.extent[axis] for chunk in chunks}
    ranks = _expert_tensor_parallel(stored)
    if chunks[0].shape[axis] != inter or lengths == {inter} or ranks == 1:
        return tuple(chunks)
    (length,) = lengths if len(lengths) == 1 else (0,)
    if length * ranks == inter:
        return tuple(chunks)
    if length * ranks * 2 != inter:
        raise IntegrityError(
            f"{stored.root}: {chunks[0].tensor}: chunks of {sorted(lengths)} rows do not fit "
            f"{inter} rows under tensor parallelism {ranks}"
        )
    return tuple(_moved(chunk, axis, length, ranks) for chunk in chunks)


def _moved(chunk: Chunk, axis: int, length: int, ranks: int) -> Chunk:
    half, rank = divmod(chunk.start[axis] // length, ranks)
    start = [*chunk.start]
    start[axis] = (rank * 2 + half) * length
    return replace(chunk, start=tuple(start))


def _expert_tensor_parallel(stored: Stored) -> int:
    sizes = _parallel(stored)
    return sizes.get("expert_tensor_parallel_size") or sizes.get("tensor_model_parallel_size", 1)


def _parallel(stored: Stored) -> dict[str, int]:
    model = stored.run.get("model")
    fields: Mapping[str, Any] = model if isinstance(model, dict) else {}
    return {
        key: value
        for key, value in fields.items()
        if key.endswith("_parallel_size") and type(value) is int and value > 0
    }


def base_model(stored: Stored) -> str | None:
    """The checkpoint that it was trained on, as run_config.yaml names it."""
    section = stored.run.get("checkpoint")
    base = section.get("pretrained_checkpoint") if isinstance(section, dict) else None
    return base if isinstance(base, str) else None

"""What Megatron saves that is not torch_dist as it is now, seen as if it were.

fsdp_dtensor and torch_dcp are state dicts as torch nests them, under `model.` and the modules'
names; NeMo 2 puts `module.` before torch_dist's names; for two weeks of 2026 Megatron-Bridge made
GPT-OSS a HybridModel, whose layers are attention and experts in turn. Main parameters are the
optimizer's float32 copies of the weights, in shapes of theirs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from gptoss_convert.containers import torch_dist
from gptoss_convert.containers.torch_dist import TorchDist
from gptoss_convert.errors import InputError, UsageError

_ROOT = "embedding.word_embeddings.weight"
_PREFIX = re.compile(r"(?:model\.)?(?:module\.)*")
_BIASED = re.compile(
    r"\.linear_fc1\.(weight|bias)\d+$|\.local_experts\.\d+\.linear_fc1\.(weight|bias)$"
)
_MAIN = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(?:fp32_param|param)\.(.+)")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
_OF_ATTENTION = ("self_attention.", "input_layernorm.")
_OF_EXPERTS = ("mlp.", "pre_mlp_layernorm.")
_FINAL = "decoder.final_norm.weight"
_PATTERN = "hybrid_layer_pattern"
_RANKS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
)


def prefix_of(names: Sequence[str]) -> str:
    """What stands before a model's names: `model.module.`, `module.`, or nothing."""
    found = [name.removesuffix(_ROOT) for name in names if name.endswith(_ROOT)]
    fitting = [prefix for prefix in found if _PREFIX.fullmatch(prefix)]
    return min(fitting, key=len, default="")


def is_nested(directory: Path, names: Sequence[str]) -> bool:
    """Whether a directory with these names is fsdp_dtensor or torch_dcp."""
    return prefix_of(names) != "" and not (directory / "metadata.json").exists()


def read(directory: Path, main: bool) -> TorchDist:
    """What a directory of `.distcp` files holds, under torch_dist's names or the modules'.

    With `main`, of each weight the optimizer's copy. Raises InputError for what ranks have
    overwritten, UsageError where there are no such copies.
    """
    names = torch_dist.tensor_names(directory)
    prefix = prefix_of(names)
    copies = {match[1]: name for name in names if (match := _MAIN.fullmatch(name))} if main else {}
    if main and not copies:
        raise UsageError(
            f"{directory}: --from-main-params: no float32 parameters of an optimizer by name; they "
            "are there with --dist-ckpt-optim-fully-reshardable, or without a distributed optimizer"
        )

    def kind(name: str) -> str:
        bare = name.removeprefix(prefix)
        if name in copies.values():
            return "weight"
        found = torch_dist.kind_of(bare)
        return "replaced" if found == "weight" and {bare, name} & copies.keys() else found

    stored = torch_dist.read(directory, kind)
    nested = is_nested(directory, names)
    state = _state(directory, stored) if nested else stored.common
    chunks = [
        replace(chunk, tensor=_bare(chunk.tensor, prefix)) if prefix or main else chunk
        for chunk in stored.chunks
    ]
    if nested:
        _require_own(directory, {chunk.tensor for chunk in chunks}, state)
    if any(chunk.tensor == _FINAL for chunk in chunks):
        chunks = [replace(chunk, tensor=_of_pairs(directory, chunk.tensor)) for chunk in chunks]
    saver = f"Megatron ({'state dict' if nested else 'NeMo 2'})" if prefix else stored.saved_by
    return replace(stored, chunks=tuple(chunks), common=state, saved_by=saver)


def _bare(name: str, prefix: str) -> str:
    match = _MAIN.fullmatch(name)
    return (match[1] if match else name).removeprefix(prefix)


def _state(directory: Path, stored: TorchDist) -> Mapping[str, object]:
    """The arguments, which such a state dict keeps as an object of its own."""
    if "args" not in stored.objects:
        return stored.common
    return {**stored.common, "args": torch_dist.read_object(directory, "args")}


def _require_own(directory: Path, names: set[str], state: Mapping[str, object]) -> None:
    """Refuse ranks whose tensors had the same names, so that the last to write won."""
    kinds = [match[1] or match[2] for match in map(_BIASED.search, names) if match]
    if kinds.count("bias") < kinds.count("weight"):
        raise InputError(
            f"{directory}: {kinds.count('weight')} experts' weights and {kinds.count('bias')} "
            "biases: with expert parallelism, biases are saved under each rank's own numbers and "
            "overwrite one another; they are lost: have Megatron save torch_dist"
        )
    args = state.get("args")
    said = args if isinstance(args, dict) else {}
    for name in _RANKS:
        if type(size := said.get(name)) is int and size > 1:
            raise InputError(
                f"{directory}: {name} is {size}: in this form ranks overwrite what has the same "
                "name on each, or join fc1 in another order; have Megatron save torch_dist"
            )


def _of_pairs(directory: Path, name: str) -> str:
    """A HybridModel's name as that of GPT's: layers 2n are attention, 2n + 1 the experts of n."""
    if name == _FINAL:
        return "decoder.final_layernorm.weight"
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name
    number, half = divmod(int(layer[1]), 2)
    if not layer[2].startswith(_OF_EXPERTS if half else _OF_ATTENTION):
        raise InputError(f"{directory}: {name}: attention and experts do not alternate")
    return f"decoder.layers.{number}.{layer[2]}"


def without_pairs(where: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    """A HybridModel's fields as GPT's: half as many layers. Any other is returned as it is."""
    pattern = fields.get(_PATTERN)
    if pattern is None:
        return fields
    layers = fields.get("num_layers")
    if not isinstance(pattern, str) or pattern != "*E" * (len(pattern) // 2):
        raise InputError(f"{where}: {_PATTERN} is {pattern!r:.80}, GPT-OSS has '*E' for each layer")
    if type(layers) is not int or layers != len(pattern):
        raise InputError(f"{where}: num_layers is {layers!r:.40}, {_PATTERN} has {len(pattern)}")
    return {**{k: v for k, v in fields.items() if k != _PATTERN}, "num_layers": layers // 2}

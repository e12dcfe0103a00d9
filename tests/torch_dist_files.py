"""Small torch_dist directories for tests: written from an image, and read back chunk by chunk."""

from __future__ import annotations

import io
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptoss_convert.containers import Chunk, Image, TensorSpec
from gptoss_convert.containers.torch_dist import extra_state_objects, image, read
from tests.tiny_files import known

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "U8": torch.uint8,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def box_of(chunk: Chunk) -> tuple[slice, ...]:
    return tuple(slice(s, s + e) for s, e in zip(chunk.start, chunk.extent, strict=True))


def bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def write_image(plan: Image, tensors: Mapping[str, Tensor], path: Path) -> Path:
    """Write an image with the tensors' values into a new directory."""
    path.mkdir(parents=True)
    for file in plan.files:
        with (path / file.name).open("wb") as stream:
            stream.truncate(file.size)
            for offset, content in file.fixed:
                stream.seek(offset)
                stream.write(content)
            for chunk in plan.chunks:
                if chunk.file == file.name:
                    stream.seek(chunk.offset)
                    stream.write(bytes_of(tensors[chunk.tensor][box_of(chunk)]))
    for name, content in known(plan).items():
        (path / name).write_bytes(content)
    return path


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return every tensor of a directory, assembled from the raw bytes of the chunks read found."""
    tensors: dict[str, Tensor] = {}
    for chunk in read(path).chunks:
        dtype = DTYPES[chunk.dtype]
        tensor = tensors.setdefault(chunk.tensor, torch.zeros(chunk.shape, dtype=dtype))
        with (path / chunk.file).open("rb") as stream:
            stream.seek(chunk.offset)
            raw = bytearray(stream.read(chunk.nbytes))
        tensor[box_of(chunk)] = torch.frombuffer(raw, dtype=dtype).reshape(chunk.extent)
    return tensors


def native_specs(tensors: Mapping[str, Tensor]) -> list[TensorSpec]:
    """Specs of a stacked model, cut as megatron-core cuts it when nothing is parallel."""
    specs = []
    for name, tensor in tensors.items():
        shape, chunk = tuple(tensor.shape), ()
        if ".layers." in name:
            chunk = (1, *shape[1:])
        if ".experts.experts." in name:
            halves = 2 if "linear_fc1" in name else 1
            chunk = (1, 1, shape[2] // halves, *shape[3:])
        specs.append(TensorSpec(name, NAMES[tensor.dtype], shape, chunk))
    return specs


def extra_state_names(layers: int, experts: int) -> list[str]:
    """Names of every `_extra_state` object that any spec of megatron-core asks for."""
    block = "decoder.layers"
    attention = f"{block}.self_attention"
    per_layer = [
        *(f"{attention}.{m}" for m in ("linear_qkv", "linear_proj", "core_attention")),
        f"{block}.pre_mlp_layernorm",
    ]
    names = [f"{m}._extra_state/shard_{n}_{layers}" for m in per_layer for n in range(layers)]
    names += [
        f"{block}.mlp.experts.experts.linear_{fc}._extra_state/shard_{n}.{e}_{layers}.{experts}"
        for fc in ("fc1", "fc2")
        for n in range(layers)
        for e in range(experts)
    ]
    return [*names, "decoder.final_layernorm._extra_state/shard_0_1"]


def write_model(tensors: Mapping[str, Tensor], path: Path, *, files: int = 2) -> Path:
    """Write a stacked model as an iteration directory that every spec of megatron-core loads."""
    layers, experts = tensors["decoder.layers.mlp.router.bias"].shape
    plan = image(
        native_specs(tensors),
        extra_state_objects(extra_state_names(layers, experts)),
        {"checkpoint_version": 3.0, "iteration": 1},
        files=files,
        max_file_bytes=1 << 30,
    )
    return write_image(plan, tensors, path)


def write_small(path: Path, specs: Sequence[TensorSpec], *, files: int = 1) -> dict[str, Tensor]:
    """Write random tensors of the given specs to a directory, and return them."""
    generator = torch.Generator().manual_seed(len(specs))
    tensors = {
        spec.name: torch.randn(spec.shape, generator=generator).mul(50).to(DTYPES[spec.dtype])
        for spec in specs
    }
    objects = extra_state_objects(["norm._extra_state/shard_0_1"])
    plan = image(specs, objects, {"iteration": 1}, files=files, max_file_bytes=1 << 20)
    write_image(plan, tensors, path)
    return tensors


def load_common(content: bytes) -> dict[str, Any]:
    """A common.pt by torch's safe loader, with the one class that megatron-core allows.

    It allows it when it is imported, once in a process: torch's own context for this would take
    that entry away again, and every load of a test after it would fail.
    """
    torch.serialization.add_safe_globals([Namespace])
    return torch.load(io.BytesIO(content), weights_only=True)

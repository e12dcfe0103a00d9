"""Directories of the tiny bases and of recorded adapters, as `adapter_values` states them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from gptoss_convert.containers import TensorSpec, torch_dist
from tests.adapter_values import adapter_values, base_shapes, base_values, config
from tests.torch_dist_files import write_image

RECORDS = Path(__file__).parent / "adapters"


@cache
def records(file: str) -> Mapping[str, Mapping[str, Any]]:
    """The variants of one file of tests/adapters that its versions could make."""
    variants = json.loads((RECORDS / file).read_text())["variants"]
    return {name: one for name, one in variants.items() if "error" not in one}


def all_records() -> Iterator[tuple[str, str]]:
    """(file, variant) of everything that is recorded."""
    for path in sorted(RECORDS.glob("*.json")):
        for name in records(path.name):
            yield path.name, name


def base_tensors(base: str) -> dict[str, Tensor]:
    """The BF16 tensors of a tiny base."""
    return {
        name: torch.from_numpy(base_values(name, shape)).bfloat16()
        for name, shape in base_shapes(base).items()
    }


def write_base(root: Path, base: str) -> Path:
    """A Hugging Face BF16 directory of a tiny base."""
    root.mkdir(parents=True)
    (root / "config.json").write_text(json.dumps(config(base)))
    save_file(base_tensors(base), root / "model.safetensors", {"format": "pt"})
    return root


def recorded_tensors(record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a recorded adapter; copies of the base's are the base's."""
    tensors: dict[str, Tensor] = {}
    for name, (dtype, shape) in record["tensors"].items():
        if ".base_layer.weight" in name:
            plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
            values: np.ndarray = base_values(plain, shape)
        else:
            values = adapter_values(name, shape)
        tensors[name] = torch.from_numpy(values).to(getattr(torch, dtype.removeprefix("torch.")))
    return tensors


def write_recorded(root: Path, record: Mapping[str, Any]) -> Path:
    """A recorded adapter's directory."""
    if "run" in record:
        return write_bridge(root, record)
    return write_adapter(
        root, recorded_tensors(record), record["config"], record["readme"], record["metadata"]
    )


def write_adapter(
    root: Path,
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    readme: list[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """An adapter's directory, as PEFT lays it out."""
    root.mkdir(parents=True)
    made = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(made, root / "adapter_model.safetensors", dict(metadata or {"format": "pt"}))
    (root / "adapter_config.json").write_text(json.dumps(settings))
    if readme:
        (root / "README.md").write_text("\n".join(["### Framework versions", "", *readme, ""]))
    return root


def write_bridge(root: Path, record: Mapping[str, Any]) -> Path:
    """A recorded adapter checkpoint of Megatron-Bridge: torch_dist and run_config.yaml."""
    tensors: dict[str, Tensor] = {}
    specs: list[TensorSpec] = []
    for key, (dtype, shape, extent) in record["tensors"].items():
        # From 0.6.0 on a pair that all experts share is stored once for each of them.
        copies = len(shape) == 4 and extent[1] == 1
        tensors[key] = bridge_values(key, [shape[0], *shape[2:]] if copies else shape)
        if copies:
            tensors[key] = tensors[key].unsqueeze(1).expand(shape).contiguous()
        specs.append(TensorSpec(key, dtype, tuple(shape), tuple(extent)))
    return write_torch_dist(root, tensors, specs, record["run"])


def bridge_values(key: str, shape: Sequence[int]) -> Tensor:
    """A stored tensor's values: by the names of its layers' parameters, one after the other."""
    plain = key.replace("mlp.experts.experts.", "mlp.experts.")
    if re.match(r"decoder\.layers\.\d", plain):
        return torch.from_numpy(adapter_values(f"module.{plain}", shape)).bfloat16()
    names = [
        plain.replace("decoder.layers.", f"module.decoder.layers.{n}.") for n in range(shape[0])
    ]
    layers = [torch.from_numpy(adapter_values(name, shape[1:])) for name in names]
    return torch.stack(layers).bfloat16()


def write_torch_dist(
    root: Path, tensors: Mapping[str, Tensor], specs: Sequence[TensorSpec], run: Mapping[str, Any]
) -> Path:
    """A torch_dist iteration of these tensors, with a run_config.yaml."""
    iteration = root / "iter_0000000"
    plan = torch_dist.image(specs, {}, {}, files=1, max_file_bytes=1 << 30)
    write_image(plan, tensors, iteration)
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(run))
    (root / "latest_checkpointed_iteration.txt").write_text("0")
    return root

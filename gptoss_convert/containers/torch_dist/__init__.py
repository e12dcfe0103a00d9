"""torch_dist: Megatron-Core's distributed checkpoint, which is PyTorch DCP plus a common state."""

from __future__ import annotations

from gptoss_convert.containers.iterations import RELEASE, find_iteration
from gptoss_convert.containers.torch_dist.reader import (
    TorchDist,
    kind_of,
    read,
    read_object,
    tensor_names,
)
from gptoss_convert.containers.torch_dist.serialized import extra_state_objects
from gptoss_convert.containers.torch_dist.writer import image

__all__ = [
    "RELEASE",
    "TorchDist",
    "extra_state_objects",
    "find_iteration",
    "image",
    "kind_of",
    "read",
    "read_object",
    "tensor_names",
]

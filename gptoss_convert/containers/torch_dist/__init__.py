"""torch_dist: Megatron-Core's distributed checkpoint, which is PyTorch DCP plus a common state.

torch is imported only to write, and then only when an image is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from gptoss_convert.containers.torch_dist.apart import image_apart
from gptoss_convert.containers.torch_dist.iterations import find_iteration
from gptoss_convert.containers.torch_dist.reader import TorchDist, read
from gptoss_convert.containers.torch_dist.writer import image

__all__ = ["TorchDist", "extra_state_objects", "find_iteration", "image", "image_apart", "read"]


def extra_state_objects(names: Iterable[str]) -> Mapping[str, bytes]:
    """Return the object to store under each `_extra_state` name: "no FP8 state"."""
    from gptoss_convert.containers.torch_dist import serialized

    return serialized.extra_state_objects(names)

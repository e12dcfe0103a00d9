"""Files of `torch.save`: tensors located in place, or the parts of them that each rank saved."""

from __future__ import annotations

from gptoss_convert.containers.torch_saves.file import SavedFile, open_all, open_saved
from gptoss_convert.containers.torch_saves.merged import (
    Merged,
    merged,
    named_values,
    read,
    require_few,
    tiled,
)
from gptoss_convert.containers.torch_saves.tensors import is_tensor, pieces

__all__ = [
    "Merged",
    "SavedFile",
    "is_tensor",
    "merged",
    "named_values",
    "open_all",
    "open_saved",
    "pieces",
    "read",
    "require_few",
    "tiled",
]

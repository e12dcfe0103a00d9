"""What a checkpoint is, told from its headers alone."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gptoss_convert.formats.checkpoint import DEFAULT, Checkpoint, Choices, casts
from gptoss_convert.hub.sources import locate, opening
from gptoss_convert.layouts.folding import TensorGroup, fold_tensors
from gptoss_convert.layouts.model import load_model


@dataclass(frozen=True)
class Inspection:
    """A checkpoint's format, size and configuration; every tensor is known and well-shaped."""

    checkpoint: Checkpoint
    files: dict[str, int]
    """Size of every weight file."""
    dtypes: dict[str, int]
    """Number of tensors by dtype."""
    groups: tuple[TensorGroup, ...]
    """Every tensor, layers and experts folded, in model order."""
    parameters: int
    tensor_bytes: int

    @property
    def encoding(self) -> str:
        """`mxfp4` or `bf16`."""
        return self.checkpoint.encoding

    def summary(self) -> dict[str, Any]:
        """The inspection as plain data."""
        checkpoint = self.checkpoint
        config = {k: v for k, v in vars(checkpoint.config).items() if k != "notes"}
        return {
            "path": checkpoint.place,
            "revision": checkpoint.commit,
            "format": checkpoint.label,
            "variant": checkpoint.variant,
            "model": checkpoint.config.size,
            "encoding": self.encoding,
            "parameters": self.parameters,
            "tensor_bytes": self.tensor_bytes,
            "tensors": len({chunk.tensor for chunk in checkpoint.chunks}),
            "dtypes": self.dtypes,
            "tensor_groups": [group.summary() for group in self.groups],
            "files": self.files,
            "scales_sidecar": checkpoint.scales is not None,
            "carried_files": [path.name for path in checkpoint.carried],
            "details": dict(checkpoint.details),
            "config": config,
            "notes": list(checkpoint.notes),
        }


def inspect(
    path: str | Path, choices: Choices = DEFAULT, revision: str | None = None
) -> Inspection:
    """Open a checkpoint and check every header; raises what `convert` would refuse it for.

    Of a repository on the Hub nothing but headers and configuration is downloaded.
    """
    with opening(locate(path, revision), replace(choices, repair=True)) as checkpoint:
        return _inspected(checkpoint)


def _inspected(checkpoint: Checkpoint) -> Inspection:
    checkpoint.extents(casts(True))
    model = load_model()
    sizes = model.sizes(checkpoint.config.numbers)
    parameters = sum(
        math.prod(sizes[axis] for axis in family.axes) for family in model.families.values()
    )
    order = checkpoint.table.tensors(checkpoint.variant, sizes)
    names = sorted({chunk.file for chunk in checkpoint.chunks})
    return Inspection(
        checkpoint,
        {name: (checkpoint.root / name).stat().st_size for name in names},
        dict(
            Counter(
                dtype for _, dtype in dict.fromkeys((c.tensor, c.dtype) for c in checkpoint.chunks)
            )
        ),
        tuple(fold_tensors(checkpoint.chunks, (tensor.name for tensor in order))),
        parameters,
        sum(chunk.nbytes for chunk in checkpoint.chunks),
    )

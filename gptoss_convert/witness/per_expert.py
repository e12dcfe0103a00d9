"""Experts that lie in a tensor each, as their writers make them of transformers' stacked ones.

unsloth-zoo keeps the interleaved rows of `gate_up` together. llm-compressor's first and third class
take even rows as gate and odd ones as up; its second hands the first half of the interleaved rows
to gate_proj and the second half to up_proj, and runs them concatenated.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gptoss_convert.witness.model import ModelConfig
from gptoss_convert.witness.readers import StoredTensors

Stacked = Callable[[StoredTensors, str, str, ModelConfig, str], Tensor]
"""`gate_up` or `down`, `weight` or `bias`, of all experts below a stem: gate and up interleaved."""


def _each(
    files: StoredTensors, name: str, c: ModelConfig, rows: int, columns: int, kind: str
) -> Tensor:
    shape = (rows, columns) if kind == "weight" else (rows,)
    return torch.stack([files.read(f"{name.format(e)}.{kind}", shape) for e in range(c.experts)])


def _unsloth(files: StoredTensors, stem: str, which: str, c: ModelConfig, kind: str) -> Tensor:
    rows, columns = (2 * c.inter, c.hidden) if which == "gate_up" else (c.hidden, c.inter)
    return _each(files, f"{stem}.{which}_projs.{{}}", c, rows, columns, kind)


def _apart(files: StoredTensors, stem: str, which: str, c: ModelConfig, kind: str) -> list[Tensor]:
    """down, or what the names call gate and up."""
    if which == "down":
        return [_each(files, f"{stem}.{{}}.down_proj", c, c.hidden, c.inter, kind)]
    names = (f"{stem}.{{}}.{one}_proj" for one in ("gate", "up"))
    return [_each(files, name, c, c.inter, c.hidden, kind) for name in names]


def _gates(files: StoredTensors, stem: str, which: str, c: ModelConfig, kind: str) -> Tensor:
    return torch.stack(_apart(files, stem, which, c, kind), dim=2).flatten(1, 2)


def _split(files: StoredTensors, stem: str, which: str, c: ModelConfig, kind: str) -> Tensor:
    return _gates(files, f"{stem}.experts", which, c, kind)


def _halves(files: StoredTensors, stem: str, which: str, c: ModelConfig, kind: str) -> Tensor:
    return torch.cat(_apart(files, stem, which, c, kind), dim=1)


PER_EXPERT: dict[str, Stacked] = {
    "expert-rows": _unsloth,
    "expert-split": _split,
    "expert-halves": _halves,
    "expert-gates": _gates,
}
"""By the word that the checkpoint's format has for the writer."""

"""PyTorch's distributed checkpoint (DCP) as trainers write it: `.metadata` and `.distcp` files.

Sources: torch.distributed.checkpoint; accelerate's FSDP utilities, NeMo-RL, torchtitan.
The container's code is loaded where there is such a file: few checkpoints are of this form.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import partial
from pathlib import Path

from gptoss_convert.containers.paths import lies
from gptoss_convert.errors import GptossError
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, read_only
from gptoss_convert.formats.names import kind_of, read_names
from gptoss_convert.formats.trained import Form, Place, open_trained, trainer_tables
from gptoss_convert.layouts.table_files import load_table

_MEGATRON = re.compile(r"(model\.)?(module\.)*(decoder|embedding|output_layer)\.")
"""How names of Megatron's model begin, whatever it is saved as."""


def is_nested(folder: Path) -> bool:
    """Whether `.metadata` is a state dict's of torch, and not of Megatron's model."""
    if not lies(folder, ".metadata") or lies(folder, "metadata.json"):
        return False
    from gptoss_convert.containers import torch_dist

    try:
        names = torch_dist.tensor_names(folder)
    except GptossError:
        # Whoever reads it says what is wrong with it.
        return False
    return not any(map(_MEGATRON.match, names))


FORM = Form(
    "a PyTorch distributed checkpoint",
    (
        Place("pytorch_model_fsdp_0", "accelerate (Trainer, TRL, axolotl) with FSDP"),
        Place("policy/weights", "NeMo-RL"),
        Place("weights", "NeMo-RL"),
        Place("", "torch.distributed.checkpoint"),
    ),
    is_nested,
)


def _open(folder: Path, choices: Choices) -> Checkpoint:
    from gptoss_convert.containers import torch_dist

    stored_names = torch_dist.tensor_names(folder)
    names = read_names(str(folder), stored_names, trainer_tables(), choices.drop)
    stored = torch_dist.read(folder, lambda name: kind_of(name, choices.drop) or "weight")
    opened = open_trained(FORMAT, FORM, folder, names, stored.chunks, choices, stored.skipped)
    return replace(opened, notes=(*opened.notes, *stored.notes))


FORMAT = read_only("dcp", partial(load_table, "hf"), FORM.recognise, _open)

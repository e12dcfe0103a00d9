"""DCP in safetensors: `shard-R-model-N-of-M`, each rank's parts, as NeMo Automodel writes them.

torchtitan writes them on the way to one directory of Hugging Face's, in `sharded/`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

from gptoss_convert.containers.safetensors import spare
from gptoss_convert.containers.sharded_safetensors import is_sharded, read_shards
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, read_only
from gptoss_convert.formats.names import left_out, read_names
from gptoss_convert.formats.trained import Form, Place, open_trained, trainer_tables
from gptoss_convert.layouts.table_files import load_table

FORM = Form(
    "a PyTorch distributed checkpoint in safetensors, files of each rank",
    (
        Place("policy/weights/model", "NeMo-RL with Automodel"),
        Place("model", "NeMo Automodel"),
        Place("sharded", "torchtitan"),
        Place("", "torch.distributed.checkpoint (NeMo Automodel, torchtitan)"),
    ),
    is_sharded,
)


def _open(folder: Path, choices: Choices) -> Checkpoint:
    stored = read_shards(folder, left_out(choices.drop))
    tensors = (chunk.tensor for chunk in stored)
    names = read_names(str(folder), tensors, trainer_tables(), choices.drop)
    opened = open_trained(FORMAT, FORM, folder, names, stored, choices)
    others = spare(folder, stored)
    notes = [f"{folder}: beside the ranks' shards {', '.join(others)}: not read"] * bool(others)
    return replace(opened, notes=(*opened.notes, *notes))


FORMAT = read_only("dcp-safetensors", partial(load_table, "hf"), FORM.recognise, _open)

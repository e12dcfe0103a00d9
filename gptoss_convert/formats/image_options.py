"""How TARGET is laid out: the options that a format's image depends on."""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from pathlib import Path

from gptoss_convert.formats.option import option


@dataclass(frozen=True)
class ImageOptions:
    """How TARGET is laid out; the defaults are the command line's."""

    to: str = option(MISSING, "Format of TARGET.", kind="target")
    dtype: str = option(
        "keep", "Encoding of the expert weights in TARGET.", among=("keep", "mxfp4", "bf16")
    )
    shards: str = option(
        "auto",
        "Files of TARGET: as the MXFP4 original's where a sidecar remembers them, else by size; "
        "always by size; or OpenAI's own names, order and boundaries.",
        among=("auto", "size", "published"),
    )
    max_shard_size: int = option(5_000_000_000, "Largest file, by size.", kind="size", shown="5GB")
    keep_scales: bool = option(
        True, "Write no sidecar of MXFP4 scales beside BF16.", flag="--no-scales"
    )
    layout: str = option(
        "stacked",
        "Megatron TARGET: all layers in one tensor, or a tensor a layer (120b loads faster).",
        among=("stacked", "per-layer"),
    )
    also_local_spec: bool = option(
        False,
        "Megatron TARGET: name the second norm also as models without Transformer Engine do.",
    )
    bridge: str = option(
        "modern",
        "Megatron TARGET: run_config.yaml for Megatron-Bridge from 0.4.0 on, or before.",
        among=("modern", "legacy"),
    )
    tokenizer: Path | None = option(None, "Directory whose tokenizer and template TARGET gets.")

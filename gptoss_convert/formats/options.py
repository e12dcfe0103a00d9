"""How TARGET is laid out: the options that a format's image depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ImageOptions:
    """How TARGET is laid out; the defaults are the command line's."""

    to: str
    dtype: str = "keep"
    shards: str = "auto"
    """`auto`: as the MXFP4 source was, where a sidecar remembers it, else by size."""
    max_shard_size: int = 5_000_000_000
    keep_scales: bool = True
    """Write the sidecar where MXFP4 is decoded."""
    layout: str = "stacked"
    """Megatron: layers `stacked` in one tensor, or one tensor `per-layer`."""
    also_local_spec: bool = False
    """Megatron: write the second norm under the local spec's name too."""
    bridge: str = "modern"
    """Megatron-Bridge: run_config.yaml for 0.4.0 and later, or `legacy`."""
    tokenizer: Path | None = None

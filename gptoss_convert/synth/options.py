"""What to synthesize: every option of `synth`."""

from __future__ import annotations

from dataclasses import dataclass

from gptoss_convert.formats.option import option, workers_option


@dataclass(frozen=True)
class SynthOptions:
    """What to synthesize; the defaults are the command line's."""

    model: str = option("tiny", "Which model's shapes.", among=("tiny", "20b", "120b"))
    layers: int | None = option(None, "Fewer layers than the model has.", least=1)
    format: str = option("hf", "Format of TARGET.", kind="target")
    dtype: str = option(
        "keep",
        "Encoding of the expert weights; keep is MXFP4.",
        among=("keep", "mxfp4", "bf16"),
    )
    shards: str = option(
        "auto",
        "Files of TARGET: as published for a whole 20b or 120b, else by size.",
        among=("auto", "size", "published"),
    )
    seed: int = option(0, "Chooses the values.")
    workers: int | None = workers_option()
    overwrite: bool = option(False, "Replace TARGET, once everything is written.")

"""How SOURCE is read: the options that opening a checkpoint depends on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.formats.option import option


@dataclass(frozen=True)
class Choices:
    """How a checkpoint is read: what opening it cannot decide by itself."""

    format: str | None = option(
        None, "Format to read, where SOURCE holds several.", flag="--from", kind="format"
    )
    repair: bool = option(
        False, "Read what transformers 5.21 to 5.23, or torchtitan's export, mis-saved."
    )
    iteration: int | None = option(
        None, "Megatron SOURCE: the iteration to read.", least=0, shown="the latest"
    )
    config: Path | None = option(
        None, "A Hugging Face config.json, where SOURCE (Megatron's, a trainer's) carries none."
    )
    drop: tuple[str, ...] = option(
        (), "Leave out tensors of SOURCE whose names match, such as 'v_head.*'; may be repeated."
    )
    vocab_size: int | None = option(
        None,
        "Rows of SOURCE's vocabulary: without Megatron's padding where nothing says so, or as "
        "training resized it where config.json is older.",
        least=1,
    )
    glu_interleave: int | None = option(
        None,
        "Megatron SOURCE: by how many rows gate and up alternate in expert fc1, 0 if they do not; "
        "needed where only Megatron-Bridge's run_config.yaml tells.",
        least=0,
    )
    gate_proj: str | None = option(
        None,
        "What a gate_proj of each expert holds, where names (experts.0.gate_proj) leave it open: "
        "its gate, or half of the rows in which gate and up alternate.",
        among=("gate", "half"),
    )
    from_main_params: bool = option(
        False,
        "Megatron SOURCE: read the float32 parameters of its optimizer instead of the weights; "
        "needs --cast.",
    )
    strict: bool = option(
        False, "Refuse what otherwise is only noted, as files that nothing names."
    )
    cast: bool = option(False, "Round a float32 or float16 SOURCE to BF16.")
    follow_links: bool = option(False, "Follow links out of SOURCE, as those of a shared store.")

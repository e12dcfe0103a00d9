"""What an adapter is, told from its headers: with its base's sizes, or without."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats.adapters import dialects
from gptoss_convert.formats.adapters.adapter import Adapter
from gptoss_convert.formats.adapters.adapter_options import AdapterOptions
from gptoss_convert.formats.adapters.opening import open_adapter
from gptoss_convert.formats.adapters.stored import Stored, read_stored
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.layouts.folding import fold_tensors

_WIDTHS = {
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 201088,
}
"""What both released models have in common."""


@dataclass(frozen=True)
class AdapterInspection:
    """An adapter's dialect, what it changes, and for which base its shapes are."""

    stored: Stored
    adapter: Adapter | None
    """As opened for its base, by one of the answers where something is left open; None if no base
    is known."""
    fits: str | None
    """The base that its shapes fit, if one was found."""
    ambiguous: str | None
    """What only the user can know, and which option says it."""

    def summary(self) -> dict[str, Any]:
        """The inspection as plain data."""
        stored, adapter = self.stored, self.adapter
        variant = dialects.named(stored)[1]
        named = "bridge" if stored.container == "torch_dist" else variant
        known = adapter.summary() if adapter else {}
        if self.ambiguous is not None:
            known |= {"dialect": named}
        base = stored.config.get("base_model_name_or_path")
        chunks = stored.chunks
        return {
            "path": str(stored.root),
            "dialect": known.get("dialect", named),
            "written_by": known.get("written_by", dialects.writer(stored, named)),
            "base_model": known.get("base_model", base if isinstance(base, str) else None),
            "r": known.get("r", stored.config.get("r")),
            "alpha": known.get("alpha", stored.config.get("lora_alpha")),
            "ranks": known.get("ranks", []),
            "rslora": bool(stored.config.get("use_rslora")),
            "dora": bool(stored.config.get("use_dora")),
            "parameters": known.get("parameters", []),
            "layers": known.get("layers", []),
            "experts": known.get("experts", []),
            "fits": self.fits,
            "ambiguous": self.ambiguous,
            "tensors": len(stored.tensors),
            "tensor_bytes": sum(chunk.nbytes for chunk in chunks),
            "tensor_groups": [one.summary() for one in fold_tensors(chunks, stored.tensors)],
            "notes": list(adapter.notes) if adapter else [],
        }


def inspect_adapter(
    root: Path, base: Checkpoint | None = None, options: AdapterOptions | None = None
) -> AdapterInspection:
    """Read an adapter's headers, for a base or for whichever released model its shapes fit.

    Raises what `convert` would refuse it for, but for ambiguities, which are told.
    """
    stored = read_stored(root)
    options = options or AdapterOptions()
    problems: list[InputError | IntegrityError] = []
    for name, numbers in _candidates(base):
        try:
            return AdapterInspection(stored, open_adapter(root, numbers, options), name, None)
        except UsageError as error:
            return AdapterInspection(stored, _by_any(root, numbers, options), name, str(error))
        except (InputError, IntegrityError) as error:
            problems.append(error)
    # Shapes that do not fit are of another base, what no base can take is told.
    if base is not None or all(isinstance(one, InputError) for one in problems):
        raise problems[0]
    return AdapterInspection(stored, None, None, None)


def _by_any(root: Path, numbers: Mapping[str, int], options: AdapterOptions) -> Adapter | None:
    """The adapter by whichever answer opens it: what it changes is the same by all."""
    for layout, down in product((None, "peft"), (None, "normal")):
        try:
            answered = replace(options, adapter_layout=layout, adapter_down=down)
            return open_adapter(root, numbers, answered)
        except UsageError:
            continue
    return None


def _candidates(base: Checkpoint | None) -> Iterator[tuple[str, Mapping[str, int]]]:
    """The bases to try: the one that is named, else those that OpenAI released."""
    if base is not None:
        yield base.place, base.config.numbers
        return
    for size, (layers, experts) in {"20b": (24, 32), "120b": (36, 128)}.items():
        counts = {"num_hidden_layers": layers, "num_local_experts": experts}
        yield f"gpt-oss-{size}", _WIDTHS | counts

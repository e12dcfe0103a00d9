"""Which dialect an adapter in PEFT's files has: told by names, marks and shapes, or by the user."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gptoss_convert.errors import InputError, IntegrityError, UsageError
from gptoss_convert.formats.adapters.adapter_options import ORIENTATIONS, AdapterOptions
from gptoss_convert.formats.adapters.resolve import Resolved, resolve
from gptoss_convert.formats.adapters.stored import Stored
from gptoss_convert.formats.adapters.tables import load_adapter_table
from gptoss_convert.layouts.model import load_model

_MARKS = {"rank_major": "peft", "grouped_by_expert": "grouped"}
"""Unsloth's words for the order of lora_B's columns."""
_FUSED = re.compile(r"mlp\.experts\.(?:base_layer\.)*lora_A\.weight$")
_NAMED = (
    (re.compile(r"\.attn\.|\.mlp\.experts\.w[123]\.|\.unembed_tokens\."), "tinker", "tinker"),
    (re.compile(r"\.mlp\.experts\.(?:gate_up|down)_projs\.\d+\."), "peft", "per-expert"),
    (re.compile(r"\.mlp\.experts\.lora_(?:gate_and_up|down)_[AB]$"), "peft", "automodel"),
    (re.compile(r"\.mlp\.experts\.\d+\.(?:gate|up|down)_proj\."), "peft", "split"),
)


@dataclass(frozen=True)
class Dialect:
    """What a file's names and layouts are, and who wrote it as far as it shows."""

    family: str
    variant: str
    written_by: str
    resolved: Resolved
    notes: tuple[str, ...] = ()


def recognise(stored: Stored, sizes: Mapping[str, int], choices: AdapterOptions) -> Dialect:
    """The dialect of an adapter in PEFT's files.

    Raises UsageError with the evidence where only the user can know, InputError for contradictions,
    IntegrityError for tensors that no dialect explains.
    """
    family, variant = named(stored)
    by_variant = _resolved(stored, sizes, family)
    fused = variant == "peft" and _is_fused(stored, by_variant("peft"))
    if not fused:
        for option, value in (("layout", choices.adapter_layout), ("down", choices.adapter_down)):
            if value is not None:
                raise UsageError(
                    f"--adapter-{option} {value}: {stored.root} holds no fused experts' LoRA: "
                    "there is nothing to choose"
                )
        return _done(stored, family, variant, by_variant(variant))
    return _fused(stored, choices, by_variant)


def _is_fused(stored: Stored, normal: Resolved) -> bool:
    """Whether a pair adapts all experts' weights of a layer, in any orientation."""
    families = load_model().families
    known = (families[param] for one in normal.found for param in one.target.params)
    unknown = any(_FUSED.search(name) for name in stored.tensors) and normal.unfit
    return bool(unknown) or any(family.encodings for family in known)


def named(stored: Stored) -> tuple[str, str]:
    """Family and variant as far as the tensors' names tell: `peft` may be another in truth."""
    names = stored.tensors
    for pattern, family, variant in _NAMED:
        if any(pattern.search(name) for name in names):
            return family, variant
    return "peft", "peft"


def _resolved(stored: Stored, sizes: Mapping[str, int], family: str) -> Callable[[str], Resolved]:
    table = load_adapter_table(family)
    return lambda variant: resolve(table, variant, stored.tensors, sizes)


def _done(stored: Stored, family: str, variant: str, resolved: Resolved, *notes: str) -> Dialect:
    if resolved.unfit:
        first, *others = resolved.unfit
        more = f" (and {len(others)} more tensors)" if others else ""
        raise IntegrityError(f"{stored.root}: {first}{more}")
    return Dialect(family, variant, writer(stored, variant), resolved, notes)


def _fused(
    stored: Stored, choices: AdapterOptions, by_variant: Callable[[str], Resolved]
) -> Dialect:
    """Experts of all one layer in one tensor: orientation by shape, order by marks, else asked."""
    normal, swapped = by_variant("peft"), by_variant("peft-swapped")
    fits = {"normal": not normal.unfit, "swapped": not swapped.unfit}
    if not any(fits.values()):
        closer = min((normal, swapped), key=lambda one: len(one.unfit))
        return _done(stored, "peft", "peft", closer)
    down = next((way for way in ORIENTATIONS if fits[way]), "normal")
    if all(fits.values()):
        down = choices.adapter_down or _square(stored)
    elif choices.adapter_down not in {None, down}:
        raise UsageError(
            f"--adapter-down {choices.adapter_down}: the shapes in {stored.root} fit {down} only"
        )
    order, note = _order(stored, down, choices.adapter_layout)
    if down == "normal":
        variant = "grouped" if order == "grouped" else "peft"
        return _done(stored, "peft", variant, by_variant(variant), *note)
    if stored.peft_version is None:
        # Genuine PEFT that swaps always writes its version.
        return _done(stored, "peft", "bridge-export", by_variant("bridge-export"), *note)
    if order == "grouped":
        raise InputError(
            f"{stored.root}: lora_B is said to be grouped by expert, but its shapes are swapped, "
            "as no version of Unsloth writes them"
        )
    return _done(stored, "peft", "peft-swapped", swapped, *note)


def _square(stored: Stored) -> str:
    """The orientation of down_proj where hidden = inter and no gate_up is stored."""
    version, readme = stored.peft_version, stored.readme.get("peft", "")
    if version is not None and version.startswith("0.18."):
        return "normal"
    if version is None and readme.startswith("0.17."):
        return "normal"
    evidence = f"peft_version {version}" if version else "no peft_version"
    if readme:
        evidence += f", a model card that says PEFT {readme}"
    if transformers := stored.readme.get("transformers"):
        evidence += f", and transformers {transformers}"
    swapping = "5" if version == "0.19.0" else "4"
    raise UsageError(
        f"{stored.root}: only down_proj is adapted, and it is square: nothing shows whether its "
        f"update is transposed ({evidence}); pass --adapter-down swapped if it was trained on "
        f"transformers {swapping}"
        + ("" if version else " by PEFT 0.19.1 or later, or exported by Megatron-Bridge")
        + ", normal otherwise"
    )


def _order(stored: Stored, down: str, asked: str | None) -> tuple[str, tuple[str, ...]]:
    """The order of lora_B's columns, and a note where it was the user who said so."""
    marks = set(_marked(stored))
    if marks:
        if len(marks) > 1 or not marks <= _MARKS.keys():
            raise InputError(
                f"{stored.where}: lora_B_layout is {' and '.join(sorted(marks)):.80}: only "
                f"{' or '.join(_MARKS)} can be merged"
            )
        marked = _MARKS[marks.pop()]
        if asked not in {None, marked}:
            raise UsageError(
                f"--adapter-layout {asked}: {stored.where} says that lora_B is {marked}"
            )
        return marked, ()
    if asked is not None:
        return asked, (f"the order of lora_B's columns is {asked} by --adapter-layout",)
    if down == "normal" and _by_unsloth(stored):
        raise UsageError(
            f"{stored.root}: saved by Unsloth (unsloth_fixed) without saying in which order the "
            "columns of the experts' lora_B are; pass --adapter-layout grouped if it was trained "
            "with unsloth_zoo 2026.2 to 2026.9.5 on transformers 5 (the usual case), peft if on "
            "transformers 4, later or with UNSLOTH_MOE_LORA_MERGED=1"
        )
    return "peft", ()


def _marked(stored: Stored) -> Iterator[str]:
    """Every word about the order of columns, wherever Unsloth has put it."""
    for place in (stored.config, _object(stored.config.get("auto_mapping"))):
        yield from _words(stored.where, place)
        more = _object(place.get("unsloth_fused_expert_lora"))
        yield from _words(stored.where, more)
        for one in _object(more.get("parameters")).values():
            yield from _words(stored.where, _object(one))


def _words(where: str, place: Mapping[str, Any]) -> Iterator[str]:
    if (word := place.get("lora_B_layout")) is not None:
        if not isinstance(word, str):
            raise InputError(f"{where}: lora_B_layout is {word!r:.80}, expects a word")
        yield word


def _object(value: object) -> Mapping[str, Any]:
    """What is stored there, nothing if it is no object."""
    return value if isinstance(value, dict) else {}


def _by_unsloth(stored: Stored) -> bool:
    return bool(_object(stored.config.get("auto_mapping")).get("unsloth_fixed"))


def writer(stored: Stored, variant: str) -> str:
    """What wrote the file, as far as it shows."""
    if variant == "automodel" or "automodel_peft_config.json" in stored.also:
        return "NeMo Automodel"
    if variant in {"tinker", "split"}:
        return "Tinker" if variant == "tinker" else "Tinker's export to PEFT"
    if variant == "bridge-export":
        return "Megatron-Bridge's export to PEFT"
    version = stored.peft_version or stored.readme.get("peft")
    peft = f"PEFT {version}" if version else "PEFT of an unstated version"
    trl = stored.readme.get("trl")
    peft += f", TRL {trl}" if trl else ""
    return f"Unsloth, {peft}" if _by_unsloth(stored) or variant == "per-expert" else peft

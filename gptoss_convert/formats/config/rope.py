"""The rope section of config.json, in both its spellings, as transformers takes it.

`rope_scaling` beside `rope_theta` is transformers 4's, `rope_parameters` with everything in it is
transformers 5's; both may be there, and must then say the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptoss_convert.errors import InputError
from gptoss_convert.formats.config.keys import KEYS, ROPE, Use, neutral
from gptoss_convert.formats.config.numbers import number

SECTIONS = ("rope_scaling", "rope_parameters")
_RELEASED: dict[str, Any] = {
    "rope_type": "yarn",
    "factor": 32.0,
    "original_max_position_embeddings": 4096,
    "truncate": False,
}
"""What transformers 5 takes where there is no section at all."""


@dataclass(frozen=True)
class Rope:
    """The numbers of a rope section, under the names that they have in it."""

    rope_theta: float
    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    truncate: bool
    attention_factor: float | None


def read(where: str, content: Mapping[str, Any], longest: int) -> tuple[Rope, tuple[str, ...]]:
    """The rope of a model whose `max_position_embeddings` is `longest`, and what was filled in."""
    for name in SECTIONS:
        if not isinstance(content.get(name), dict | None):
            raise InputError(f"{where}: rope_parameters and rope_scaling must be objects")
    stated = {name: content[name] for name in SECTIONS if content.get(name) is not None}
    if not stated.get("rope_scaling", True) and "rope_parameters" in stated:
        # transformers goes by the other section then.
        del stated["rope_scaling"]
    if not any(stated.values()) and "rope_parameters" not in stated:
        rope, notes = _section(where, "rope_scaling", _RELEASED, content, longest)
        missing = "rope_scaling and rope_parameters are missing or null"
        taken = "taken as released, as transformers 5 does; transformers 4 may use no YaRN"
        return rope, (f"{missing}: {taken}", *notes)
    read = {name: _section(where, name, one, content, longest) for name, one in stated.items()}
    (rope, notes), *others = read.values()
    for other, _ in others:
        for key, value in asdict(other).items():
            if value != (old := getattr(rope, key)):
                raise InputError(
                    f"{where}: rope_parameters.{key} is {value!r}, rope_scaling has {old!r}"
                )
    return rope, notes


def _section(
    where: str, name: str, section: Mapping[str, Any], content: Mapping[str, Any], longest: int
) -> tuple[Rope, tuple[str, ...]]:
    _check(where, name, section, content)
    original = section.get("original_max_position_embeddings", longest)
    place = f"{where}: {name}"
    numbers: dict[str, Any] = {
        "beta_fast": ROPE["beta_fast"].value,
        "beta_slow": ROPE["beta_slow"].value,
        "rope_theta": content.get("rope_theta", KEYS["rope_theta"].value),
        "original_max_position_embeddings": original,
        **{key: value for key, value in section.items() if value is not None},
    }
    whole = number(place, numbers, "original_max_position_embeddings", int)
    if "factor" in section and section["factor"] is None:
        numbers["factor"] = longest / whole
    theta, factor, fast, slow = (
        float(number(where if key == "rope_theta" else place, numbers, key, float))
        for key in ("rope_theta", "factor", "beta_fast", "beta_slow")
    )
    truncate = section.get("truncate", ROPE["truncate"].value)
    if not isinstance(truncate, bool | None):
        raise InputError(f"{place}: truncate is {truncate!r:.80}, expects true or false")
    rope = Rope(theta, factor, whole, fast, slow, bool(truncate), _attention(place, numbers))
    notes = (
        ()
        if "truncate" in section
        else ("rope truncate is missing: taken as true, as transformers does; released: false",)
    )
    if "original_max_position_embeddings" not in section:
        notes += (
            f"rope original_max_position_embeddings is missing: taken as {whole}, "
            "max_position_embeddings, as transformers does",
        )
    return rope, notes


def _check(where: str, name: str, section: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Refuse another kind of rope, and every key that might change it and is not read."""
    kinds = {key: section[key] for key in ("rope_type", "type") if key in section}
    for kind in kinds.values() or (None,):
        if kind != "yarn":
            raise InputError(f"{where}: rope_type is {kind!r:.80}, GPT-OSS has 'yarn'")
    for key, value in section.items():
        known = ROPE.get(key)
        if known is None and value is not None:
            raise InputError(
                f"{where}: {name}.{key} is {value!r:.80}: no key of YaRN; remove it if the model "
                "does not depend on it"
            )
        if known is not None and known.use is Use.REFUSED and not neutral(value, known.value):
            raise InputError(f"{where}: {name}.{key} is {value!r:.80}: {known.why}")
    both = (section.get("rope_theta"), content.get("rope_theta"))
    if None not in both and both[0] != both[1]:
        raise InputError(
            f"{where}: {name}.rope_theta is {both[0]!r:.80}, rope_theta is {both[1]!r:.80}"
        )


def _attention(place: str, section: Mapping[str, Any]) -> float | None:
    """The factor of cosines and sines, None where it is YaRN's own."""
    factor = float(section["factor"])
    own = _scale(factor, 1.0)
    if "attention_factor" in section:
        found = float(number(place, section, "attention_factor", float))
    elif "mscale" in section and "mscale_all_dim" in section:
        scale, all_dim = (
            float(number(place, section, key, float)) for key in ("mscale", "mscale_all_dim")
        )
        found = _scale(factor, scale) / _scale(factor, all_dim)
    else:
        return None
    return None if found == own else found


def _scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

"""The answer of a verification in words a person understands."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptoss_convert.show.report_page.document import Stage, Tone, number, share, visible

LEVELS = {
    "header": "both complete, the same shapes and configuration",
    "values": "every parameter, bit by bit",
    "logits": "both compute the same",
    "oracle": "the ecosystems' own models agree",
}
"""What each level asks."""
_EXPERTS = ("gate_up.weight", "down.weight")

Levels = Mapping[str, Mapping[str, Any]]
"""The levels that ran, by name, as plain data."""


def tone(summary: Mapping[str, Any], levels: Levels) -> Tone:
    """Same, different, or the same within limits although values differ."""
    if not summary["same"]:
        return "different"
    return "same" if all(level["same"] for level in levels.values()) else "within"


def headline(summary: Mapping[str, Any], levels: Levels) -> str:
    """The answer in a few words."""
    found = tone(summary, levels)
    if found == "within":
        return f"The same within the limits “{summary['limits']}”"
    deepest = [*levels][-1]
    if found == "same":
        return {"header": "The same configuration", "values": "The same values"}.get(
            deepest, "The same model"
        )
    return "Different models" if not levels["header"]["same"] else "Different weights"


def reasons(summary: Mapping[str, Any], levels: Levels) -> tuple[str, ...]:
    """What the answer rests on, one sentence each."""
    found = [*_header(levels), *_values(summary, levels), *_logits(summary, levels)]
    return tuple(visible(text) for text in [*found, *_oracle(levels), *_not_asked(levels)])


def _header(levels: Levels) -> Iterator[str]:
    if not levels["header"]["same"]:
        yield f"{_listed(levels['header']['findings'])}."
        yield "Weights of models whose numbers differ have no counterparts: none were compared."


def _values(summary: Mapping[str, Any], levels: Levels) -> Iterator[str]:
    if "values" not in levels:
        return
    values = levels["values"]["numbers"]
    if levels["values"]["same"]:
        yield f"Every one of {values['elements']:,} values is equal, bit by bit."
        return
    part = share(values["differing"] / values["elements"])
    yield f"{values['differing']:,} of {values['elements']:,} values differ ({part})."
    if only_quantised(summary, values):
        yield (
            "Only expert weights differ, and one side alone holds them as MXFP4: this is what a "
            f"lossy quantisation leaves. {_noise(values)}"
        )
    else:
        yield _first(values["differences"])


def _first(differences: Sequence[Mapping[str, Any]]) -> str:
    """The first difference on the way from the input to the output."""
    first = min(differences, key=lambda d: -1 if d["layer"] is None else d["layer"])
    where = "" if first["layer"] is None else f" of layer {first['layer']}"
    tensor = min(first["target_tensors"])
    looks = f" It looks {first['looks']}." if first["looks"] else ""
    others = len(differences) - 1
    more = f" So do {others} others." if others > 1 else " So does one other." if others else ""
    return f"The first to differ is {first['parameter']}{where}, {tensor} in TARGET.{looks}{more}"


def only_quantised(summary: Mapping[str, Any], values: Mapping[str, Any]) -> bool:
    """Whether only expert weights differ, one side alone is MXFP4, and no mistake explains it."""
    packed = [bool((values["statistics"] or {}).get(f"{side}_scales"))
              for side in ("source", "target")]  # fmt: skip
    experts = all(one["parameter"] in _EXPERTS for one in values["differences"])
    explained = any(one["looks"] for one in values["differences"])
    return experts and not explained and packed[0] != packed[1]


def _noise(values: Mapping[str, Any]) -> str:
    maps = values["statistics"]["sqnr"]
    cells = sorted(c for one in maps.values() for row in one for c in row if c is not None)
    if not cells:
        return ""
    return (
        f"Signal to noise of the experts: {cells[0]:.1f} dB at worst, "
        f"{cells[len(cells) // 2]:.1f} dB in the middle."
    )


def _logits(summary: Mapping[str, Any], levels: Levels) -> Iterator[str]:
    if "logits" not in levels:
        return
    logits, overall = levels["logits"], levels["logits"]["numbers"]["overall"]
    where = f"{overall['positions']:,} positions"
    largest = number(overall["max_delta"])
    if not logits["same"]:
        allowed = number(logits["numbers"]["limits"]["max_delta"])
        yield f"The logits differ by up to {largest} at {where}; {allowed} is allowed."
        if first := logits["numbers"]["first_over"]:
            yield (
                f"They part after layer {first['layer']}, {first['block']}: whatever comes before "
                "is within the limit."
            )
        if levels["values"]["same"]:
            yield (
                "The values are equal as the mapping tables read them, yet the models compute "
                "something else: a table, not a weight, is wrong."
            )
    elif overall["max_delta"] == 0:
        yield f"Both compute the same: no logit differs at any of {where}, not by one bit."
    else:
        allowed = number(logits["numbers"]["limits"]["max_delta"])
        yield (
            f"The logits differ by at most {largest} at {where}; the limits "
            f"“{summary['limits']}” allow {allowed}."
        )


def _oracle(levels: Levels) -> Iterator[str]:
    if "oracle" not in levels:
        return
    oracle = levels["oracle"]
    if oracle["same"]:
        yield f"{oracle['text'][0].upper()}{oracle['text'][1:]}."
    else:
        yield f"{_listed(oracle['findings'])}."


def _not_asked(levels: Levels) -> Iterator[str]:
    if "logits" not in levels and levels["header"]["same"]:
        yield (
            "No logits were computed, so a mistake in a mapping table itself would not show: "
            "“--level logits” sees it."
        )


def _listed(findings: tuple[str, ...] | list[str]) -> str:
    more = f"; and {len(findings) - 3} more" if len(findings) > 3 else ""
    return "; ".join(findings[:3]) + more


def steps(levels: Levels) -> tuple[Stage, ...]:
    """Each level with its answer."""
    return tuple(_step(name, levels.get(name), asks) for name, asks in LEVELS.items())


def _step(name: str, level: Mapping[str, Any] | None, asks: str) -> Stage:
    if level is None:
        return Stage(name, "not run", asks)
    told = f"{asks}, {level['seconds']:.1f} s"
    return Stage(name, "same" if level["same"] else "different", told)

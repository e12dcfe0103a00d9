"""The page of `diff`: the answer first, then configuration, weights, what one side lacks."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from gptoss_convert.layouts.ranges import ranges
from gptoss_convert.show.pages import Facts, Grid, Page


def diff_page(summary: Mapping[str, Any]) -> Page:
    """The page of `diff`: the answer first, then configuration, weights, what one side lacks."""
    a, b = summary["a"], summary["b"]
    sides = {name: f"{s['format']:<9}  {s['path']}" for name, s in (("a", a), ("b", b))}
    keys = _changed_keys(summary)
    weights = [row for module in summary["modules"] for row in _changed_weights(module)]
    columns = ("parameter", "layers", "changed", "relative norm", "max abs")
    tables = [Grid(("config", "a", "b"), keys)] if keys else []
    tables += [Grid(columns, weights, right=frozenset(columns[2:]))] if weights else []
    page: list[str | Facts | Grid] = [summary["verdict"], "", Facts(sides)]
    for table in tables:
        page += ["", table]
    lines = [*_other_encodings(summary), *_one_sided(summary)]
    return [*page, *([""] if lines else []), *lines]


def _changed_keys(summary: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the model's numbers that differ, and of all other keys of config.json that do."""
    found = {key: tuple(map(_brief, pair)) for key, pair in summary["numbers"].items()}
    keys = summary["keys"] or {"removed": {}, "added": {}, "changed": {}}
    found |= {key: (_brief(value), "-") for key, value in keys["removed"].items()}
    found |= {key: ("-", _brief(value)) for key, value in keys["added"].items()}
    found |= {key: (_brief(old), _brief(new)) for key, (old, new) in keys["changed"].items()}
    return [(key, *pair) for key, pair in found.items()]


def _brief(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _changed_weights(module: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """A row for a module that changed, then one for each of its parameters that did."""
    changed = [one for one in module["parameters"] if one["changed"]]
    if len(changed) > 1:
        yield _change(module["module"], module, [n for one in changed for n in _layers(one)])
    for one in changed:
        indent = "  " if len(changed) > 1 else ""
        yield _change(f"{indent}{one['parameter']}", one, _layers(one))


def _layers(parameter: Mapping[str, Any]) -> list[int]:
    return [layer["layer"] for layer in parameter["layers"] if layer["changed"]]


def _change(name: str, change: Mapping[str, Any], layers: Iterable[int]) -> tuple[str, ...]:
    norm = change["relative_norm"]
    return (
        name,
        ranges(layers) or "-",
        f"{100 * change['share']:.3g} %",
        "from zero" if norm is None else f"{norm:.2e}",
        f"{change['max_abs']:.3g}",
    )


def _other_encodings(summary: Mapping[str, Any]) -> Iterator[str]:
    """What is equal: values that both sides encode alike, and values that they do not."""
    parameters = [one for module in summary["modules"] for one in module["parameters"]]
    equal = [one for one in parameters if not one["changed"]]
    apart = [one for one in equal if one["encodings"][0] != one["encodings"][1]]
    for one in apart:
        old, new = one["encodings"]
        yield f"same values, other encoding: {one['parameter']} ({old} in a, {new} in b)"
    if equal:
        yield f"equal: {len(equal)} of {len(parameters)} parameters"


def _one_sided(summary: Mapping[str, Any]) -> Iterator[str]:
    for side in ("a", "b"):
        yield from (f"only in {side}: {name}" for name in summary[f"only_in_{side}"])
    for name, (old, new) in summary["shapes"].items():
        sizes = (" x ".join(map(str, shape)) for shape in (old, new))
        yield f"other shape: {name}, {' in a, '.join(sizes)} in b"
    nonfinite = summary["total"]["nonfinite"]
    if nonfinite:
        yield f"note: {nonfinite:,} infinities or NaN are left out of the norms"

"""The tables in `mappings/*.toml`, read and checked."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from gptoss_convert import containers
from gptoss_convert.errors import InputError
from gptoss_convert.layouts.layout import STAR, Layout
from gptoss_convert.layouts.model import Model, load_model, only_keys, read_toml
from gptoss_convert.layouts.tables import HOLE, ObjectRule, Rule, Table

_RULE_KEYS = {"param", "layout", "chunk", "at", "part", "alias"}


@cache
def load_table(format: str) -> Table:
    """The table of a format (`hf`, `openai`, `megatron`, `scales`), fully checked."""
    return parse_table(format, read_toml(f"{format}.toml"), load_model())


def parse_table(format: str, content: Mapping[str, Any], model: Model) -> Table:
    """Check and build a table; raises InputError naming the file, the tensor and the axis."""
    where = f"{format}.toml"
    sections = {k: v for k, v in content.items() if k not in {"container", "partial", "variants"}}
    for key in ("container", "variants"):
        if key not in content:
            raise InputError(f"{where}: no {key!r}")
    if find_spec(f"{containers.__name__}.{content['container']}") is None:
        raise InputError(f"{where}: unknown container {content['container']!r}")
    rules: dict[str, list[Rule]] = {}
    states: dict[str, list[ObjectRule]] = {}
    for section, entries in sections.items():
        plain = {name: rule for name, rule in entries.items() if "object" not in rule}
        rules[section] = [_rule(where, name, rule, model) for name, rule in plain.items()]
        states[section] = [
            _object_rule(where, name, rule, model)
            for name, rule in entries.items()
            if name not in plain
        ]
    variants: dict[str, tuple[Rule, ...]] = {}
    objects: dict[str, tuple[ObjectRule, ...]] = {}
    for variant, members in content["variants"].items():
        unknown = [section for section in members if section not in rules]
        if unknown:
            raise InputError(f"{where}: variant {variant!r} names no section {unknown[0]!r}")
        variants[variant] = tuple(rule for section in members for rule in rules[section])
        objects[variant] = tuple(rule for section in members for rule in states[section])
        _check_variant(
            f"{where}: {variant}", variants[variant], model, content.get("partial", False)
        )
    unused = set(rules) - {
        section for members in content["variants"].values() for section in members
    }
    if unused:
        raise InputError(f"{where}: section {min(unused)!r} belongs to no variant")
    return Table(
        format, content["container"], content.get("partial", False), variants, objects, model
    )


def _object_rule(where: str, name: str, content: Mapping[str, Any], model: Model) -> ObjectRule:
    place = f"{where}: {name}"
    only_keys(place, content, {"object"})
    axes = tuple(content["object"].split())
    for axis in (*HOLE.findall(name), *axes):
        if axis not in model.axes:
            raise InputError(f"{place}: unknown axis {axis!r}")
    return ObjectRule(name, axes)


def _rule(where: str, name: str, content: Mapping[str, Any], model: Model) -> Rule:
    place = f"{where}: {name}"
    only_keys(place, content, _RULE_KEYS)
    for key in ("param", "layout"):
        if key not in content:
            raise InputError(f"{place}: no {key!r}")
    params = content["param"] if isinstance(content["param"], list) else [content["param"]]
    for param in params:
        if param not in model.params:
            raise InputError(f"{place}: unknown parameter {param!r}")
    at = content.get("at", {})
    try:
        layout = Layout.parse(content["layout"])
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    chunk = tuple(content.get("chunk", "").split())
    part = _part(place, content["part"]) if "part" in content else None
    rule = Rule(name, tuple(params), layout, chunk, at, content.get("alias", False), part)
    for axis in (*rule.named, *layout.axes, *chunk):
        if axis != STAR and axis not in model.axes:
            raise InputError(f"{place}: unknown axis {axis!r}")
    for axis in chunk:
        if axis not in layout.axes:
            raise InputError(f"{place}: chunk axis {axis!r} is not in layout {layout.text!r}")
    dtypes = {model.dtype(param): param for param in rule.params}
    if len(dtypes) > 1:
        held = ", ".join(f"{param!r} is {dtype}" for dtype, param in dtypes.items())
        raise InputError(f"{place}: {held}")
    _check_axes(place, rule, model)
    return rule


def _part(place: str, part: Any) -> tuple[int, int]:
    if isinstance(part, list) and len(part) == 2 and all(type(n) is int for n in part):
        index, count = part
        if 1 <= index <= count:
            return index, count
    raise InputError(f"{place}: part {part!r}, expects [i, n]: the i-th of n equal parts")


def _check_axes(place: str, rule: Rule, model: Model) -> None:
    """Every axis of every parameter stands exactly once, in the name or in the layout."""
    explicit = [axis for axis in rule.layout.axes if axis != STAR]
    starred = STAR in rule.layout.axes
    for param in rule.params:
        axes = model.params[param]
        for axis in (*rule.named, *explicit):
            if axis not in axes:
                raise InputError(
                    f"{place}: {param!r} has no axis {axis!r} (axes: {' '.join(axes)})"
                )
            if axis in rule.named and axis in explicit:
                raise InputError(f"{place}: axis {axis!r} stands in the name and in the layout")
        missing = [axis for axis in axes if axis not in rule.named and axis not in explicit]
        if missing and not starred:
            raise InputError(
                f"{place}: layout {rule.layout.text!r} places no axis {missing[0]!r} of {param!r}"
            )
    if len(rule.params) > 1 and not starred:
        raise InputError(
            f"{place}: {len(rule.params)} parameters need a '*' in {rule.layout.text!r}"
        )


def _check_variant(place: str, rules: tuple[Rule, ...], model: Model, partial: bool) -> None:
    """Every parameter is held exactly once: plain, or all of one encoding."""
    names = [rule.name for rule in rules]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{place}: tensor {name!r} appears twice")
    held: dict[str, list[Rule]] = {}
    for rule in rules:
        for param in rule.params if not rule.alias else ():
            held.setdefault(param, []).append(rule)
    for param, holders in held.items():
        if not _once(holders, model):
            raise InputError(f"{place}: {param!r} is held by {', '.join(r.name for r in holders)}")
    if partial:
        return
    for family in model.families.values():
        encoded = [param for param in family.members[1:] if param in held]
        if family.weight in held and encoded:
            raise InputError(f"{place}: {family.weight!r} is held plain and as {encoded[0]!r}")
        if family.weight not in held and family.stored(held) is None:
            raise InputError(f"{place}: {family.weight!r} is held by no tensor")


def _once(holders: list[Rule], model: Model) -> bool:
    """Whether the indexes fixed by the holders' `at`, or their parts, cover it exactly once."""
    if any(rule.part for rule in holders):
        return sorted(rule.part or (0, 0) for rule in holders) == [
            (index + 1, len(holders)) for index in range(len(holders))
        ]
    if len(holders) == 1:
        return not holders[0].at
    fixed = [rule.at for rule in holders]
    axes = {axis for at in fixed for axis in at}
    if len(axes) != 1 or any(len(at) != 1 for at in fixed):
        return False
    (axis,) = axes
    return model.axes[axis] == len(fixed) and sorted(at[axis] for at in fixed) == [
        *range(len(fixed))
    ]

"""Adapter tables: which tensor holds which half of which parameter's update, and in what layout.

They are `mappings/adapters/*.toml`. A rule's key is its role: `a` and `b` are the halves of an
update, `magnitude` is DoRA's, `added` is added as it is, `rows` replaces rows.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from gptoss_convert.errors import InputError
from gptoss_convert.layouts.layout import STAR, Layout
from gptoss_convert.layouts.model import Model, load_model, only_keys, read_toml
from gptoss_convert.layouts.updates import RANK, Kind

ROLES = ("a", "b", "magnitude", "added", "rows")
ONE = "one"
"""An axis of length 1 that no parameter has."""
TOKEN = "token"
"""The rows that `rows` replaces, in the order of the configuration's list."""
HOLE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """What a tensor of this name holds if its shape fits."""

    name: str
    role: str
    params: tuple[str, ...]
    layout: Layout
    at: Mapping[str, int]

    @property
    def named(self) -> tuple[str, ...]:
        """The axes whose index the name, or `at`, gives."""
        return (*HOLE.findall(self.name), *self.at)

    @property
    def explicit(self) -> frozenset[str]:
        """The axes that the name, `at` and the layout state."""
        return frozenset((*self.named, *self.layout.axes)) - {STAR, ONE}


@dataclass(frozen=True, slots=True)
class Target:
    """The rules that belong together: what one update of these parameters can consist of."""

    params: tuple[str, ...]
    kind: Kind
    at: tuple[tuple[str, int], ...]
    rules: Mapping[str, tuple[Rule, ...]]
    """By role; several rules of a role tell their tensors apart by shape."""

    def axes(self, rule: Rule, param: str, model: Model) -> tuple[str, ...]:
        """The axes of `param` that a tensor of this rule has, and `rank` if it has it.

        `*` stands for those that are left: neither named nor held by the other half.
        """
        known = rule.explicit
        if STAR in rule.layout.axes:
            role = "a" if rule.role == "b" else "b"
            other = frozenset[str]().union(*(one.explicit for one in self.rules.get(role, ())))
            known |= {axis for axis in model.params[param] if axis not in other}
        axes = tuple(axis for axis in model.params[param] if axis in known)
        return (*axes, RANK) if RANK in known else axes


@dataclass(frozen=True)
class AdapterTable:
    """The tensors of one family of dialects."""

    file: str
    prefix: str
    wrapper: str
    variants: Mapping[str, tuple[str, ...]]
    sections: Mapping[str, tuple[Target, ...]]

    def targets(self, variant: str) -> Iterator[Target]:
        """The targets of one dialect."""
        for section in self.variants[variant]:
            yield from self.sections[section]

    def plain(self, name: str) -> tuple[str, int]:
        """A tensor's name without prefix and wrappers, and how many wrappers it had."""
        name = name.removeprefix(self.prefix)
        return (
            (name.replace(self.wrapper, ""), name.count(self.wrapper))
            if self.wrapper
            else (name, 0)
        )


@cache
def load_adapter_table(name: str) -> AdapterTable:
    """The table of a family (`peft`, `tinker`, `bridge`), fully checked."""
    file = f"adapters/{name}.toml"
    return parse_adapter_table(file, read_toml(file), load_model())


def parse_adapter_table(file: str, content: Mapping[str, Any], model: Model) -> AdapterTable:
    """Check and build a table; raises InputError naming the file, the tensor and the axis."""
    plain = {"prefix", "wrapper", "parameters", "variants"}
    variants = {name: tuple(sections) for name, sections in content["variants"].items()}
    parameters = set(content.get("parameters", ()))
    sections = {
        section: _targets(file, entries, _kind(section, parameters), model)
        for section, entries in content.items()
        if section not in plain
    }
    used = {section for members in variants.values() for section in members}
    if odd := used ^ sections.keys() | parameters - sections.keys():
        raise InputError(f"{file}: section {min(odd)!r} is not both defined and used")
    return AdapterTable(
        file, content.get("prefix", ""), content.get("wrapper", ""), variants, sections
    )


def _kind(section: str, parameters: set[str]) -> Kind:
    if section == "embedding":
        return "embedding"
    return "parameter" if section in parameters else "module"


def _targets(file: str, entries: Mapping[str, Any], kind: Kind, model: Model) -> tuple[Target, ...]:
    grouped: dict[tuple[Any, ...], dict[str, list[Rule]]] = defaultdict(lambda: defaultdict(list))
    for name, entry in entries.items():
        for one in entry if isinstance(entry, list) else [entry]:
            rule = _rule(f"{file}: {name}", name, one, model)
            grouped[rule.params, tuple(rule.at.items()), _stem(rule)][rule.role].append(rule)
    targets: list[Target] = []
    for (params, at, _), roles in grouped.items():
        rules = {role: tuple(found) for role, found in roles.items()}
        target = Target(params, kind, at, rules)
        _check(file, target, model)
        targets.append(target)
    return tuple(targets)


def _stem(rule: Rule) -> str:
    """What tells two updates of the same parameters apart; magnitudes belong to a pair."""
    if rule.role in {"added", "rows"}:
        return rule.role
    return re.split(r"\.?(?:lora_|linear_in|linear_out)", rule.name)[0]


def _rule(place: str, name: str, content: Mapping[str, Any], model: Model) -> Rule:
    only_keys(place, content, {*ROLES, "layout", "at"})
    roles = [role for role in ROLES if role in content]
    if len(roles) != 1 or "layout" not in content:
        raise InputError(f"{place}: expects one of {', '.join(ROLES)}, and a layout")
    held = content[roles[0]]
    params = tuple(held) if isinstance(held, list) else (held,)
    try:
        layout = Layout.parse(content["layout"])
    except InputError as error:
        raise InputError(f"{place}: {error}") from None
    rule = Rule(name, roles[0], params, layout, content.get("at", {}))
    for param in params:
        if param not in model.families:
            raise InputError(f"{place}: unknown parameter {param!r}")
        for axis in rule.explicit - {RANK, TOKEN}:
            if axis not in model.params[param]:
                raise InputError(f"{place}: {param!r} has no axis {axis!r}")
    return rule


def _check(file: str, target: Target, model: Model) -> None:
    """Every axis of a parameter has a place in a half, but for those that all experts share."""
    for param in target.params:
        for rules in (target.rules.get("a"), target.rules.get("b")):
            if ("a" in target.rules) != ("b" in target.rules):
                raise InputError(f"{file}: {param!r} has one half only")
            for rule in rules or ():
                if RANK not in rule.layout.axes:
                    raise InputError(f"{file}: {rule.name}: no axis {RANK!r}")
        held: set[str] = set()
        for rule in (one for rules in target.rules.values() for one in rules):
            held |= {*target.axes(rule, param, model)}
        missing = [axis for axis in model.params[param] if axis not in held | {"expert", "vocab"}]
        if missing:
            raise InputError(f"{file}: {param!r}: no half has axis {missing[0]!r}")


def holes_of(name: str) -> tuple[str, tuple[int, ...]]:
    """A name with each number of its own in place of `{}`, and these numbers."""
    parts = name.split(".")
    numbers = tuple(int(part) for part in parts if _is_number(part))
    return ".".join("{}" if _is_number(part) else part for part in parts), numbers


def _is_number(part: str) -> bool:
    return part.isascii() and part.isdigit() and len(part) < 6 and str(int(part)) == part


def template(rule: Rule) -> str:
    """The rule's name in the form of `holes_of`."""
    return HOLE.sub("{}", rule.name)


def bound(rule: Rule, numbers: Sequence[int]) -> dict[str, int]:
    """The index of each axis that a name with these numbers, or `at`, gives."""
    return {**dict(zip(HOLE.findall(rule.name), numbers, strict=True)), **rule.at}

"""Tensors to updates: each tensor of an adapter is one half of one update, by name and by shape."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.adapters.tables import (
    ONE,
    TOKEN,
    AdapterTable,
    Rule,
    Target,
    bound,
    holes_of,
    template,
)
from gptoss_convert.layouts.layout import shape_of
from gptoss_convert.layouts.model import Model, load_model
from gptoss_convert.layouts.table_files import load_table
from gptoss_convert.layouts.updates import RANK, Kind

Tensors = Mapping[str, tuple[Chunk, ...]]


@dataclass(frozen=True, slots=True)
class Held:
    """A stored tensor as a rule sees it, if its shape fits."""

    name: str
    chunks: tuple[Chunk, ...]
    rule: Rule
    bound: Mapping[str, int]
    rank: int
    """0 for a tensor without this axis."""


@dataclass(frozen=True, slots=True)
class Found:
    """The tensors that make one update of a target."""

    target: Target
    kind: Kind
    name: str
    """Of the module or parameter, for the patterns of the configuration."""
    held: Mapping[str, Held]


@dataclass(frozen=True, slots=True)
class Resolved:
    """All tensors of a file, each used once."""

    found: tuple[Found, ...]
    whole: Mapping[str, str]
    """Tensors that are a whole parameter, by their names in Hugging Face's BF16 layout."""
    unfit: tuple[str, ...]
    """Why the first tensor that belongs to no update does not, in words, then the others."""


def resolve(
    table: AdapterTable, variant: str, tensors: Tensors, sizes: Mapping[str, int]
) -> Resolved:
    """Find each tensor's update; a tensor that two updates could claim is an InputError."""
    rules: dict[str, list[tuple[Target, Rule]]] = defaultdict(list)
    for target in table.targets(variant):
        for rule in (one for several in target.rules.values() for one in several):
            rules[template(rule)].append((target, rule))
    groups: dict[tuple[Any, ...], tuple[Target, dict[str, list[Held]]]] = {}
    whole: dict[str, str] = {}
    known: dict[str, list[Rule]] = {}
    names = whole_names(sizes)
    stored: dict[tuple[str, int], str] = {}
    for name in tensors:
        plain, level = table.plain(name)
        if (twin := stored.setdefault((plain, level), name)) != name:
            raise IntegrityError(f"{name}: stored twice, once more as {twin}")
        form, numbers = holes_of(plain)
        if plain in names:
            whole[name] = plain
        for target, rule in rules.get(form, ()):
            known.setdefault(name, []).append(rule)
            if held := _fit(name, tensors[name], rule, numbers, sizes, target):
                key = (id(target), numbers, level)
                group = groups.setdefault(key, (target, defaultdict(list)))
                group[1][rule.role].append(held)
    found = [one for group in groups.values() for one in _complete(*group, table)]
    users: dict[str, list[Found]] = defaultdict(list)
    for one in found:
        for held in one.held.values():
            users[held.name].append(one)
    claimed = {name for name in users if len(users[name]) > 1}
    if claimed:
        name = min(claimed)
        params = " or ".join(one.target.params[0] for one in users[name])
        raise InputError(f"{name}: its shape {list(_shape(tensors, name))} fits {params}")
    lost = [name for name in tensors if name not in users and name not in whole]
    first = [_why(name, tensors, known.get(name, []), sizes, table) for name in lost[:1]]
    unfit = (*first, *lost[1:])
    return Resolved(tuple(found), whole, unfit)


def whole_names(sizes: Mapping[str, int]) -> frozenset[str]:
    """The tensors of Hugging Face's BF16 layout."""
    return frozenset(t.name for t in load_table("hf").tensors("bf16", sizes))


def _fit(
    name: str,
    chunks: tuple[Chunk, ...],
    rule: Rule,
    numbers: Sequence[int],
    sizes: Mapping[str, int],
    target: Target,
) -> Held | None:
    """The tensor by this rule, None if its shape or the numbers in its name do not fit."""
    indexes = bound(rule, numbers)
    if any(index >= sizes[axis] for axis, index in indexes.items()):
        return None
    shape = chunks[0].shape
    free = RANK if RANK in rule.layout.axes else TOKEN if TOKEN in rule.layout.axes else None
    length = _solve(rule, shape, free, sizes, target)
    return Held(name, chunks, rule, indexes, length) if length is not None else None


def _solve(
    rule: Rule, shape: Sequence[int], free: str | None, sizes: Mapping[str, int], target: Target
) -> int | None:
    """The length of the free axis for which the layout has this shape, 0 without such an axis."""
    model = load_model()
    params = {param: axes_of(target, rule, param, model) for param in target.params}
    lengths = {**sizes, ONE: 1}
    unit, _ = shape_of(rule.layout, params, {**lengths, RANK: 1, TOKEN: 1}, rule.named)
    if len(unit) != len(shape):
        return None
    if free is None:
        return 0 if tuple(unit) == tuple(shape) else None
    dim = next(i for i, axes in enumerate(rule.layout.dims) if free in axes)
    length, rest = divmod(shape[dim], unit[dim])
    others = (*unit[:dim], unit[dim] * length, *unit[dim + 1 :])
    return length if not rest and length and others == tuple(shape) else None


def axes_of(target: Target, rule: Rule, param: str, model: Model) -> tuple[str, ...]:
    """All axes of a tensor of this rule as far as it holds a parameter, named ones included."""
    others = (axis for axis in (ONE, TOKEN) if axis in rule.layout.axes)
    return (*others, *target.axes(rule, param, model))


def _complete(
    target: Target, roles: Mapping[str, Sequence[Held]], table: AdapterTable
) -> Iterator[Found]:
    """The updates for which both halves are there and of the same rank."""
    if "a" in target.rules:
        for a, b in product(roles.get("a", ()), roles.get("b", ())):
            if a.rank == b.rank:
                others = {r: held[0] for r, held in roles.items() if r not in {"a", "b"}}
                name = _module(a, table, target)
                yield Found(target, target.kind, name, {"a": a, "b": b, **others})
        return
    for held in (one for several in roles.values() for one in several):
        yield Found(target, target.kind, _module(held, table, target), {held.rule.role: held})


def _module(held: Held, table: AdapterTable, target: Target) -> str:
    """What PEFT calls it: the module's name, or the parameter's."""
    if target.kind == "parameter":
        rules = load_table("hf").variant("bf16")
        name = next(rule.name for rule in rules if target.params[0] in rule.params)
        return name.format_map(held.bound)
    return table.plain(held.name)[0].partition(".lora_")[0].partition(".token_adapter")[0]


def _shape(tensors: Tensors, name: str) -> tuple[int, ...]:
    return tensors[name][0].shape


def _why(
    name: str,
    tensors: Tensors,
    rules: Sequence[Rule],
    sizes: Mapping[str, int],
    table: AdapterTable,
) -> str:
    """Why a tensor belongs to no update."""
    if not rules:
        return f"{name}: no tensor of this dialect and this base has this name"
    indexes = bound(rules[0], holes_of(table.plain(name)[0])[1])
    for axis, index in indexes.items():
        if index >= sizes[axis]:
            return f"{name}: {axis} {index}, the base has {sizes[axis]}: of another model"
    shape = f"shape {list(_shape(tensors, name))}"
    if rules[0].role in {"a", "b"}:
        if (other := _other_half(name)) not in tensors:
            return f"{name}: its other half, {other}, is missing"
        shape += f" beside the other half's {list(_shape(tensors, other))}"
    fits = " or ".join(dict.fromkeys(repr(rule.layout.text) for rule in rules[:4]))
    return f"{name}: {shape} does not fit {fits}"


def _other_half(name: str) -> str:
    """The tensor that makes an update together with this one."""
    for mine, other in (("lora_A", "lora_B"), ("linear_in", "linear_out")):
        for here, there in ((mine, other), (other, mine)):
            if here in name:
                return name.replace(here, there)
    return f"{name[:-1]}{'B' if name.endswith('A') else 'A'}"

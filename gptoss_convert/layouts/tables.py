"""Mapping tables: what each stored tensor of a format holds, from `mappings/*.toml`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.layouts.layout import Layout, Placement, shape_of
from gptoss_convert.layouts.model import Model

HOLE = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True)
class Rule:
    """What one stored tensor, or one per layer and expert, holds."""

    name: str
    params: tuple[str, ...]
    layout: Layout
    chunk: tuple[str, ...]
    at: Mapping[str, int]
    alias: bool
    """A second copy of a parameter that another tensor of the same variant already holds."""
    part: tuple[int, int] | None = None
    """(i, n): it is the i-th, counted from 1, of n equal parts of the first dimension."""

    @property
    def named(self) -> tuple[str, ...]:
        """The axes whose index the tensor's name gives."""
        return (*HOLE.findall(self.name), *self.at)


@dataclass(frozen=True, slots=True)
class ObjectRule:
    """Serialized objects that a loader asks for beside the tensors, one per index of `axes`."""

    name: str
    axes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Tensor:
    """One stored tensor of a checkpoint of known size: its rule, with the name's axes bound."""

    name: str
    rule: Rule
    dtype: str
    shape: tuple[int, ...]
    chunk_shape: tuple[int, ...]
    placements: tuple[Placement, ...]
    bound: Mapping[str, int]

    def whole(self, chunk: Chunk) -> Chunk:
        """A chunk of this tensor as one of the tensor that it is a part of, if it is."""
        if self.rule.part is None:
            return chunk
        index, count = self.rule.part
        rows, *others = chunk.shape
        first, *rest = chunk.start
        start = (first + (index - 1) * rows, *rest)
        return replace(chunk, shape=(rows * count, *others), start=start)


@dataclass(frozen=True)
class Table:
    """The tensors of one format, by variant."""

    format: str
    container: str
    partial: bool
    variants: Mapping[str, tuple[Rule, ...]]
    objects: Mapping[str, tuple[ObjectRule, ...]]
    model: Model

    def variant(self, name: str) -> tuple[Rule, ...]:
        """The rules of a variant; raises UsageError that lists the choices."""
        if name not in self.variants:
            raise UsageError(
                f"{self.format}: no variant {name!r}; choose {', '.join(self.variants)}"
            )
        return self.variants[name]

    def holds(self, variant: str) -> frozenset[str]:
        """The parameters that a variant stores."""
        return frozenset(param for rule in self.variant(variant) for param in rule.params)

    def object_names(self, variant: str, sizes: Mapping[str, int]) -> Iterator[str]:
        """The names of all objects of a checkpoint, `<name>/shard_<indexes>_<lengths>`."""
        for rule in self.objects[variant]:
            lengths = [sizes[axis] for axis in rule.axes] or [1]
            shard = ".".join(map(str, lengths))
            for name, _ in _fill(rule.name, sizes, {}):
                for index in product(*map(range, lengths)):
                    yield f"{name}/shard_{'.'.join(map(str, index))}_{shard}"

    def names(self, variant: str, sizes: Mapping[str, int]) -> Iterator[tuple[str, str]]:
        """Name and dtype of every tensor of this variant, whose shapes nobody has asked for."""
        for rule in self.variant(variant):
            for name, _ in _fill(rule.name, sizes, {}):
                yield name, self.model.dtype(rule.params[0])

    def tensors(self, variant: str, sizes: Mapping[str, int]) -> Iterator[Tensor]:
        """Every tensor of a checkpoint of this variant, in the order of the model's layers."""
        rules = [(rule, *_shape(rule, self.model, sizes)) for rule in self.variant(variant)]
        layered = ["layer" in entry[0].named for entry in rules]
        first = layered.index(True) if any(layered) else len(rules)
        inner = [entry for entry, inside in zip(rules, layered, strict=True) if inside]
        after = [e for e, inside in zip(rules[first:], layered[first:], strict=True) if not inside]
        for entry in rules[:first]:
            yield from self._bind(entry, sizes, {})
        for layer in range(sizes["layer"]):
            for entry in inner:
                yield from self._bind(entry, sizes, {"layer": layer})
        for entry in after:
            yield from self._bind(entry, sizes, {})

    def _bind(
        self,
        entry: tuple[Rule, tuple[int, ...], tuple[int, ...], tuple[Placement, ...]],
        sizes: Mapping[str, int],
        bound: Mapping[str, int],
    ) -> Iterator[Tensor]:
        rule, shape, chunk_shape, placements = entry
        dtype = self.model.dtype(rule.params[0])
        for name, names in _fill(rule.name, sizes, bound):
            at = {**names, **rule.at}
            yield Tensor(name, rule, dtype, shape, chunk_shape, placements, at)


def _fill(
    name: str, sizes: Mapping[str, int], bound: Mapping[str, int]
) -> Iterator[tuple[str, dict[str, int]]]:
    """Every name that a name with holes stands for, and the index of each hole's axis."""
    holes = [axis for axis in HOLE.findall(name) if axis not in bound]
    for index in product(*(range(sizes[axis]) for axis in holes)):
        names = {**bound, **dict(zip(holes, index, strict=True))}
        yield name.format_map(names), names


def _shape(
    rule: Rule, model: Model, sizes: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[Placement, ...]]:
    params = {param: model.params[param] for param in rule.params}
    shape, placements = shape_of(rule.layout, params, sizes, rule.named)
    if rule.part is not None:
        if shape[0] % rule.part[1]:
            raise InputError(f"{rule.name}: {shape[0]} rows are not {rule.part[1]} equal parts")
        shape = (shape[0] // rule.part[1], *shape[1:])
    if not rule.chunk:
        return shape, (), placements
    cut = dict.fromkeys(rule.chunk, 1)
    chunk_shape, _ = shape_of(rule.layout, params, {**sizes, **cut}, rule.named)
    return shape, chunk_shape, placements

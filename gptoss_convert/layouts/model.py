"""The model: axes and parameters of GPT-OSS, from `mappings/model.toml`, fully checked."""

from __future__ import annotations

import math
import re
import tomllib
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from gptoss_convert.codecs.codec import Codec, load_codec
from gptoss_convert.errors import InputError
from gptoss_convert.layouts.layout import Box

_SIZE = re.compile(r"([a-z_]+)(?: / ([a-z_]+|\d+))?")


@dataclass(frozen=True, slots=True)
class Encoding:
    """A weight as a codec stores it: the parameters that hold the codec's members."""

    codec: Codec
    params: tuple[str, ...]
    """In the order of the codec's members."""
    axes: tuple[tuple[str, ...], ...]
    """Of each parameter, slowest first."""

    @property
    def hints(self) -> tuple[str, ...]:
        """The parameters that lead an encoding back to a former one."""
        return tuple(self.param(member) for member in self.codec.hints)

    def param(self, member: str) -> str:
        """The parameter that holds a member."""
        return dict(zip(self.codec.members, self.params, strict=True))[member]

    def by_member(self) -> Iterator[tuple[str, str]]:
        """Each member and its parameter."""
        return zip(self.codec.members, self.params, strict=True)


class Sizes(dict[str, int]):
    """The length of every axis; of blocks only where the axis they cut is whole blocks long.

    Asking for another raises InputError: without MXFP4 nothing asks.
    """

    def __init__(self, lengths: Mapping[str, int], broken: Mapping[str, str]):
        super().__init__(lengths)
        self._broken = broken

    def __missing__(self, axis: str) -> int:
        if axis in self._broken:
            raise InputError(self._broken[axis])
        raise KeyError(axis)


@dataclass(frozen=True, slots=True)
class Family:
    """A weight, and the parameters that hold it where a codec has encoded it."""

    weight: str
    axes: tuple[str, ...]
    encodings: tuple[Encoding, ...] = ()
    dtype: str = "BF16"
    """Of the weight's values."""

    @property
    def members(self) -> tuple[str, ...]:
        """The weight, and the parameters of its encodings."""
        return (self.weight, *(param for one in self.encodings for param in one.params))

    @property
    def hints(self) -> frozenset[str]:
        """The parameters that lead an encoding back to a former one."""
        return frozenset(param for one in self.encodings for param in one.hints)

    @property
    def block(self) -> int:
        """Values along the last axis that no codec cuts apart."""
        return math.lcm(*(one.codec.block for one in self.encodings))

    def stored(self, held: Container[str]) -> Encoding | None:
        """The encoding of which all is held, if there is one."""
        whole = (one for one in self.encodings if all(param in held for param in one.params))
        return next(whole, None)

    def box(self, param: str, box: Box) -> Box:
        """The box of a parameter of the family that holds a box of the weight."""
        for one in self.encodings:
            for member, name in one.by_member():
                if name == param:
                    return one.codec.member_box(member, box)
        return box


@dataclass(frozen=True)
class Model:
    """The model's axes and parameters, from `model.toml`."""

    axes: Mapping[str, str | int]
    params: Mapping[str, tuple[str, ...]]
    """Axes of every parameter, those of encodings included, slowest first."""
    families: Mapping[str, Family]
    """By the weight's name, in model order."""
    dtypes: Mapping[str, str]
    """Of the parameters of encodings."""

    @cached_property
    def codecs(self) -> Mapping[str, Codec]:
        """The codecs of all weights, by name."""
        encodings = (one for family in self.families.values() for one in family.encodings)
        return {one.codec.name: one.codec for one in encodings}

    def sizes(self, config: Mapping[str, int]) -> Sizes:
        """The length of every axis, for the numbers of a config.json."""
        lengths: dict[str, int] = {}
        broken: dict[str, str] = {}
        for axis, rule in self.axes.items():
            length = _size(axis, rule, config)
            if isinstance(length, int):
                lengths[axis] = length
            else:
                broken[axis] = length
        sizes = Sizes(lengths, broken)
        for family in self.families.values():
            whole = tuple((0, sizes[axis]) for axis in family.axes)
            for param in family.members[1:]:
                if broken.keys() & set(self.params[param]):
                    continue
                found = tuple((0, sizes[axis]) for axis in self.params[param])
                if found != family.box(param, whole):
                    raise InputError(f"model.toml: {param}: its axes have not its codec's lengths")
        return sizes

    def dtype(self, param: str) -> str:
        """BF16 for weights, and what the codec says for the parameters of encodings."""
        return self.dtypes.get(param, "BF16")


@cache
def load_model() -> Model:
    """The model, from the installed tables."""
    return parse_model(read_hub())


def read_hub() -> dict[str, Any]:
    """The content of `model.toml`, and of the tables of the codecs beside it."""
    content = read_toml("model.toml")
    for table in tables_in("codecs"):
        for section, entries in read_toml(f"codecs/{table}").items():
            content[section] = content.get(section, {}) | entries
    return content


def parse_model(content: Mapping[str, Any], find: Callable[[str], Codec] = load_codec) -> Model:
    """Check and build the model; raises InputError naming the parameter and the axis.

    A section besides axes and parameters names a codec, which `find` finds.
    """
    axes: dict[str, str | int] = content["axes"]
    for axis, rule in axes.items():
        if not isinstance(rule, int) and not _SIZE.fullmatch(rule):
            raise InputError(
                f"model.toml: axis {axis!r}: {rule!r} is not a key, a number or a quotient"
            )
    params = {name: _axes(name, text, axes) for name, text in content["params"].items()}
    families = {name: Family(name, where) for name, where in params.items()}
    dtypes: dict[str, str] = {}
    for section in [key for key in content if key not in {"axes", "params"}]:
        codec = find(section)
        for weight, members in content[section].items():
            where = f"model.toml: [{section}]"
            if weight not in families:
                raise InputError(f"{where} names {weight!r}, which is no parameter")
            family = families[weight]
            held = _members(f"{where} {weight}", family, codec, members, axes)
            if taken := held.keys() & params.keys():
                raise InputError(f"{where} {weight}: {min(taken)!r} is a parameter already")
            encoding = Encoding(codec, tuple(held), tuple(held.values()))
            families[weight] = replace(family, encodings=(*family.encodings, encoding))
            params |= held
            dtypes |= dict(zip(held, codec.members.values(), strict=True))
    return Model(axes, params, families, dtypes)


def _members(
    where: str, family: Family, codec: Codec, members: Mapping[str, str], axes: Mapping[str, object]
) -> dict[str, tuple[str, ...]]:
    """The parameters that hold a weight's encoding, with their axes."""
    only_keys(where, members, {*codec.members})
    probe = tuple((0, codec.block) for _ in family.axes)
    held: dict[str, tuple[str, ...]] = {}
    for member in codec.members:
        param = f"{family.weight}.{member}"
        if member not in members:
            raise InputError(f"{where}: no {member!r}")
        held[param] = _axes(param, members[member], axes)
        rows = min(len(held[param]), len(family.axes) - 1)
        ranks = len(codec.member_box(member, probe))
        if len(held[param]) != ranks or held[param][:rows] != family.axes[:rows]:
            raise InputError(f"{where}: only the last axis may be cut into blocks")
    return held


def _size(axis: str, rule: str | int, config: Mapping[str, int]) -> int | str:
    """The length of an axis, or in words why it has none."""
    if isinstance(rule, int):
        return rule
    match = _SIZE.fullmatch(rule)
    if match is None:
        raise InputError(
            f"model.toml: axis {axis!r}: {rule!r} is not a key, a number or a quotient"
        )
    top = config[match[1]]
    if match[2] is None:
        return top
    bottom = int(match[2]) if match[2].isdigit() else config[match[2]]
    if top % bottom and match[2].isdigit():
        return (
            f"config: {match[1]} is {top}, no multiple of {bottom}: MXFP4 encodes whole blocks of "
            f"{bottom} values; BF16 experts can have any size"
        )
    if top % bottom:
        raise InputError(f"config: {match[1]} {top} is not a multiple of {match[2]} {bottom}")
    return top // bottom


def _axes(name: str, text: str, axes: Mapping[str, object]) -> tuple[str, ...]:
    names = tuple(text.split())
    for axis in names:
        if axis not in axes:
            raise InputError(f"model.toml: {name}: unknown axis {axis!r}")
        if names.count(axis) > 1:
            raise InputError(f"model.toml: {name}: axis {axis!r} appears twice")
    return names


def read_toml(name: str) -> dict[str, Any]:
    """The content of an installed table."""
    return tomllib.loads((_folder() / name).read_text(encoding="utf-8"))


def tables_in(folder: str) -> list[str]:
    """The names of the installed tables in a folder."""
    return sorted(place.name for place in (_folder() / folder).glob("*.toml"))


def _folder() -> Path:
    """Where the tables are installed."""
    return Path(str(import_module("gptoss_convert.mappings").__file__)).parent


def only_keys(where: str, content: Mapping[str, object], known: set[str]) -> None:
    """Refuse any other key; raises InputError that lists the known ones."""
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")

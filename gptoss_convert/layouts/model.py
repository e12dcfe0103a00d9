"""The hub: axes and parameters of GPT-OSS, from `mappings/model.toml`, fully checked."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from gptoss_convert.errors import InputError

_SIZE = re.compile(r"([a-z_]+)(?: / ([a-z_]+|\d+))?")
BLOCK = 32
"""Values of one MXFP4 block."""


@dataclass(frozen=True, slots=True)
class Family:
    """A weight and, where MXFP4 can encode it, the parameters that hold its blocks and scales."""

    weight: str
    axes: tuple[str, ...]
    blocks: str | None = None
    scales: str | None = None

    @property
    def members(self) -> tuple[str, ...]:
        """The weight, and its blocks and scales if it has them."""
        return tuple(name for name in (self.weight, self.blocks, self.scales) if name)


@dataclass(frozen=True)
class Model:
    """The hub: axes and parameters, from `model.toml`."""

    axes: Mapping[str, str | int]
    params: Mapping[str, tuple[str, ...]]
    """Axes of every parameter, blocks and scales included, slowest first."""
    families: Mapping[str, Family]
    """By the weight's name, in model order."""

    def sizes(self, config: Mapping[str, int]) -> dict[str, int]:
        """The length of every axis, for the numbers of a config.json."""
        return {axis: _size(axis, rule, config) for axis, rule in self.axes.items()}

    def dtype(self, param: str) -> str:
        """U8 for blocks and scales, BF16 for everything else."""
        return "BF16" if param in self.families else "U8"


@cache
def load_model() -> Model:
    """The hub, from the installed `model.toml`."""
    return parse_model(read_toml("model.toml"))


def parse_model(content: Mapping[str, Any]) -> Model:
    """Check and build the hub; raises InputError naming the parameter and the axis."""
    only_keys("model.toml", content, {"axes", "params", "mxfp4"})
    axes: dict[str, str | int] = content["axes"]
    for axis, rule in axes.items():
        if not isinstance(rule, int) and not _SIZE.fullmatch(rule):
            raise InputError(
                f"model.toml: axis {axis!r}: {rule!r} is not a key, a number or a quotient"
            )
    params = {name: _axes(name, text, axes) for name, text in content["params"].items()}
    families = {name: Family(name, where) for name, where in params.items()}
    for weight, encoded in content["mxfp4"].items():
        if weight not in families:
            raise InputError(f"model.toml: [mxfp4] names {weight!r}, which is no parameter")
        only_keys(f"model.toml: [mxfp4] {weight}", encoded, {"blocks", "scales"})
        blocks = _axes(f"{weight}.blocks", encoded["blocks"], axes)
        scales = _axes(f"{weight}.scales", encoded["scales"], axes)
        if blocks[:-1] != scales or scales[:-1] != params[weight][:-1]:
            raise InputError(
                f"model.toml: [mxfp4] {weight}: only the last axis may be cut into blocks"
            )
        families[weight] = Family(weight, params[weight], f"{weight}.blocks", f"{weight}.scales")
        params |= {f"{weight}.blocks": blocks, f"{weight}.scales": scales}
    return Model(axes, params, families)


def _size(axis: str, rule: str | int, config: Mapping[str, int]) -> int:
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
    text = resources.files("gptoss_convert.mappings").joinpath(name).read_text(encoding="utf-8")
    return tomllib.loads(text)


def only_keys(where: str, content: Mapping[str, object], known: set[str]) -> None:
    """Refuse any other key; raises InputError that lists the known ones."""
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown key {key!r}; known: {', '.join(sorted(known))}")

"""What several commands share: types of values, and options as dataclasses declare them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import click

from gptoss_convert.errors import EXIT_CODES
from gptoss_convert.formats.option import Option

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY = {"ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30, "ti": 1 << 40}
F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")
EPILOG = "\b\nExit status:\n" + "\n".join(f"  {code:<4}{why}" for code, why in EXIT_CODES.items())


class Size(click.ParamType[int]):
    """A number of bytes such as 5GB, 256MB or 4GiB."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Bytes; fails with the accepted form."""
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", value.strip().lower())
        if match is None:
            self.fail(f"{value!r} is no size; write for example 5GB, 256MB or 4GiB", param, ctx)
        unit = match[2] or ""
        return int(float(match[1]) * (_UNITS.get(unit) or _BINARY[unit]))


class Percentage(click.ParamType[float]):
    """A share such as 5%."""

    name = "share"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """From 0 to 1; fails with the accepted form."""
        if isinstance(value, float):
            return value
        match = re.fullmatch(r"(\d+(?:\.\d+)?)%", value.strip())
        if match is None or not 0 < float(match[1]) <= 100:
            self.fail(f"{value!r} is no share; write for example 5%", param, ctx)
        return float(match[1]) / 100


class Choice(click.Choice[str]):
    """One of a few words."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Lists the words, and names the one that was probably meant."""
        message = super().get_invalid_choice_message(value, ctx)
        near = get_close_matches(str(value), self.choices, n=1)
        return f"{message} Did you mean {near[0]!r}?" if near else message


class FormatName(Choice):
    """The name of a format. Which there are is asked when it matters: that loads all of them."""

    def __init__(self, *, written: bool = False) -> None:
        self._written = written
        self.case_sensitive = True

    @property
    def choices(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The names of all formats, or of those that are written."""
        from gptoss_convert.formats.registry import FORMATS

        return tuple(one.name for one in FORMATS.values() if one.written or not self._written)


PATH = click.Path(path_type=Path)
SOURCE = click.Path()
"""A directory or a repository on the Hub, as it was written; shells complete it as a path."""
as_json_flag = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
quiet_flag = click.option(
    "-q", "--quiet", is_flag=True, help="Print nothing but errors, and --json if asked for."
)
rank_log_option = click.option(
    "--rank-log", type=PATH, help="Under torchrun: directory for a log of each rank."
)
_KINDS = {
    "size": Size,
    "format": FormatName,
    "target": lambda: FormatName(written=True),
    "place": lambda: SOURCE,
}


def options_of(kind: type, *only: str, place: str = "SOURCE") -> Callable[[F], F]:
    """The options that a dataclass declares as its fields, or some of them, in their order.

    `place` is what the command calls the checkpoint that it reads.
    """
    return _options(kind, only, lambda flag: [flag], place)


def side_options(kind: type, first: str, second: str) -> Callable[[F], F]:
    """The same for each of two checkpoints; the first one's are also those of one checkpoint."""

    def both(command: F) -> F:
        of_second = _options(kind, (), lambda flag: [f"{flag}-{second}"], second.upper(), second)
        of_first = _options(kind, (), lambda flag: [flag, f"{flag}-{first}"], first.upper(), first)
        return of_first(of_second(command))

    return both


def side_of(kind: type[T], side: str, given: dict[str, Any]) -> T:
    """The dataclass that the options of a side make; takes them out of `given`."""
    names = [one.name for one in fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: given.pop(f"{name}_{side}") for name in names})


def _options(
    kind: type,
    only: Sequence[str],
    flags: Callable[[str], list[str]],
    place: str,
    side: str = "",
) -> Callable[[F], F]:
    declared = [one for one in fields(kind) if "option" in one.metadata]
    chosen = [one for one in declared if not only or one.name in only]

    def apply(command: F) -> F:
        for one in reversed(chosen):
            command = _option(one, flags, place, f"_{side}" if side else "")(command)
        return command

    return apply


def _option(
    one: Field[Any], flags: Callable[[str], list[str]], place: str, ending: str
) -> Callable[[F], F]:
    how: Option = one.metadata["option"]
    names = flags(how.flag or f"--{one.name.replace('_', '-')}")
    help = how.help.replace("SOURCE", place)
    destination = one.name + ending
    default = how.shown if how.kind == "size" and one.default else one.default
    told = f"  [default: {how.shown}]" if how.shown and default is not how.shown else ""
    more: dict[str, Any] = {"help": help + told}
    if str(one.type) == "bool":
        more |= {"is_flag": True, "flag_value": not one.default, "default": one.default}
        more["show_default"] = False
    elif str(one.type).startswith("tuple"):
        more |= {"type": str, "multiple": True, "default": one.default, "metavar": "PATTERN"}
    else:
        more["type"] = _type_of(str(one.type), how)
        more |= {"is_flag": False, "flag_value": how.alone} if how.alone else {}
        more |= {"required": True} if default is MISSING else {"default": default}
        more["show_default"] = not told
    return click.option(*names, destination, **more)


def _type_of(annotated: str, how: Option) -> Any:
    """How the words on a command line become a field's value."""
    if how.kind:
        return _KINDS[how.kind]()
    if how.among:
        return Choice(how.among)
    if annotated.startswith("int"):
        return click.IntRange(how.least, how.most)
    if annotated.startswith("float"):
        return float
    return PATH if annotated.startswith("Path") else str

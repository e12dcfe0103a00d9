"""Options: each is declared once, as a field of a dataclass.

The command line makes its options of these fields: name, default, help and accepted values.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from gptoss_convert.errors import UsageError


@dataclass(frozen=True)
class Option:
    """What a field does not say by itself: how the command line offers it."""

    help: str
    flag: str | None = None
    """Its name, where that is not the field's; a `--no-` flag turns the field off."""
    among: tuple[str, ...] = ()
    """The words that it accepts."""
    kind: str | None = None
    """`size`: bytes such as 5GB; `format`: the name of a checkpoint format; `target`: of one that
    is written, too; `place`: a directory or a repository on the Hub."""
    least: int | None = None
    most: int | None = None
    alone: str | None = None
    """What the option means without a value, where it may stand alone."""
    shown: str | None = None
    """The default as --help tells it, where the value says too little."""


def option(default: Any, help: str, **how: Any) -> Any:
    """A field with this default that is an option of the command line, too; see `Option`."""
    return field(default=default, metadata={"option": Option(help, **how)})


def workers_option() -> Any:
    """How many threads take part."""
    shown = "processors + 2, at most 16"
    return option(None, "Steps in flight at once.", least=1, most=256, shown=shown)


def memory_option(more: str = "") -> Any:
    """Bytes that all buffers fit in."""
    shown = "400MB, or what --workers take" + more
    return option(None, "Memory that the buffers may take.", kind="size", shown=shown)


def require_words(options: Any, *names: str) -> None:
    """Raise UsageError where one of these options is none of the words that it accepts."""
    for one in fields(options):
        value = getattr(options, one.name)
        if one.name in names and value not in (words := one.metadata["option"].among):
            raise UsageError(f"--{one.name} {value}: choose {', '.join(words)}")

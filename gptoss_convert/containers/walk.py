"""Walking to a file component by component, so that nothing exchanged meanwhile is followed.

Each directory is opened from the one before it, without following links. On the way to a directory
there is none; below it they are resolved by hand, and never lead above it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from gptoss_convert.errors import DiskError, InputError, IntegrityError
from gptoss_convert.errors.refusals import disk_error

FOLDER = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_LINKS = 40
"""Most links on the way to one file, as for Linux."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a name leads: an open directory, and a name in it that is no link."""

    folder: int
    last: str
    """`.` is the directory itself."""
    names: tuple[str, ...]
    """The way from the root, without links."""


@contextmanager
def folder(path: Path) -> Iterator[int]:
    """A descriptor of a directory that no link leads to; raises LinkError and OSError."""
    # An automounter wakes only for what lies within: O_PATH alone leaves it asleep.
    os.access(f"{path}/.", os.F_OK)
    here = os.open(path.anchor or ".", FOLDER)
    try:
        for part in path.parts[bool(path.anchor) :]:
            try:
                before, here = here, os.open(part, FOLDER, dir_fd=here)
            except NotADirectoryError:
                if link := _link(part, here):
                    raise LinkError(f"{path}: {part} is a link to {link} by now") from None
                raise
            os.close(before)
        yield here
    finally:
        os.close(here)


@contextmanager
def walk(root: Path, name: str) -> Iterator[Place]:
    """Where `root/name` lies at or below `root`.

    Raises OutsideError where a link leads out, IntegrityError where it dangles, and OSError.
    """
    way = _Way(root, name)
    with folder(root) as base, ExitStack() as held:
        try:
            found = way.go(base, held)
        except FileNotFoundError:
            if not way.links:
                raise
            raise IntegrityError(f"{root / name}: dangling link") from None
        yield found


@contextmanager
def told(path: Path) -> Iterator[None]:
    """What the system refuses becomes an error that names the path."""
    try:
        yield
    except FileNotFoundError:
        raise IntegrityError(f"{path}: no such file") from None
    except OSError as error:
        raise disk_error(path, error) from error


class LinkError(InputError):
    """A link on a way that had none."""


class OutsideError(Exception):
    """A link leads out of the directory, to `place`."""

    def __init__(self, place: Path) -> None:
        super().__init__(str(place))
        self.place = place


class _Way:
    """What is left of the way to a name below a root."""

    def __init__(self, root: Path, name: str) -> None:
        self._root = Path(os.path.normpath(root.absolute()))
        self._path = root / name
        self._left = name.split("/")[::-1]
        self._names: list[str] = []
        self.links = 0

    def go(self, base: int, held: ExitStack) -> Place:
        """Follow it from an open directory; what is opened is held."""
        folders = [base]
        while self._left:
            part = self._left.pop()
            if part == "..":
                if not self._names:
                    raise self._outside("..")
                self._names.pop()
                folders.pop()
            elif part not in {"", "."}:
                if link := _link(part, folders[-1]):
                    if link.startswith("/"):
                        link = self._below(link)
                        folders, self._names = [base], []
                    self._follow(link)
                    continue
                self._names.append(part)
                if any(one not in {"", "."} for one in self._left):
                    folders.append(_opened(held, part, folders[-1], FOLDER))
        if not self._names or len(folders) == len(self._names) + 1:
            return Place(folders[-1], ".", tuple(self._names))
        return Place(folders[-1], self._names[-1], tuple(self._names))

    def _follow(self, link: str) -> None:
        self.links += 1
        if self.links > _LINKS:
            raise DiskError(f"{self._path}: too many levels of links")
        # Where it leads out it does so at once: nothing above the root is ever looked at.
        if not self._lexical(link).is_relative_to(self._root):
            raise self._outside(link)
        self._left += link.split("/")[::-1]

    def _below(self, link: str) -> str:
        """An absolute link, from the root."""
        if not Path(link).is_relative_to(self._root):
            raise self._outside(link)
        return str(Path(link).relative_to(self._root))

    def _outside(self, link: str) -> OutsideError:
        return OutsideError(self._lexical(link, *self._left[::-1]))

    def _lexical(self, *parts: str) -> Path:
        return Path(os.path.normpath(self._root.joinpath(*self._names, *parts)))


def _link(name: str, folder: int) -> str | None:
    """What a link says, None for what is no link."""
    try:
        return os.readlink(name, dir_fd=folder)
    except FileNotFoundError:
        raise
    except OSError:
        return None


def _opened(held: ExitStack, name: str, folder: int | None, flags: int) -> int:
    descriptor = os.open(name, flags, dir_fd=folder)
    held.callback(os.close, descriptor)
    return descriptor

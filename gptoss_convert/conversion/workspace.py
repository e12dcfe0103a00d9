"""The hidden directory that TARGET is made in, and the journal beside it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath

from gptoss_convert.containers.walk import LinkError, folder
from gptoss_convert.conversion.journal import marked
from gptoss_convert.conversion.target import journal_path, locked_journal, rounded_path, work_path
from gptoss_convert.errors import GptossError, InputError, IntegrityError, TargetError, UsageError
from gptoss_convert.machine.private import (
    list_folder,
    make_folder,
    own_folder,
    remove_folder,
    remove_marked,
)

_USELESS = {InputError.exit_code, IntegrityError.exit_code}
"""Statuses after which the unfinished work is useless; after any other it can be resumed."""
_REFUSED = {UsageError.exit_code, TargetError.exit_code}


class ForeignError(TargetError):
    """Something lies in the hidden directory that no conversion put there."""


@dataclass
class Workspace:
    """Where TARGET is made: a hidden directory, and the journal beside it, held by a lock."""

    target: Path
    names: Set[str]
    """All that TARGET will hold, and the hidden directory with it."""
    journal: int
    """The journal's descriptor, open for reading and writing."""
    fresh: bool
    """Whether no interrupted run left anything."""
    inode: int | None
    """Of the hidden directory, which the journal speaks of."""

    @property
    def work(self) -> Path:
        """The hidden directory."""
        return work_path(self.target)

    @property
    def old(self) -> Path:
        """Where a TARGET that was replaced goes."""
        return self.work.with_name(f"{self.work.name}.old")

    def open(self, replaced: int | None = None) -> int:
        """Make the hidden directory, or take what an interrupted run left of it; its inode.

        Raises TargetError for one that the journal does not speak of, or with more in it, and for
        what is left of a TARGET, other than the one that was being `replaced`.
        """
        if os.path.lexists(self.old) and self.old.lstat().st_ino != replaced:
            raise TargetError(f"{self.old}: what is left of a TARGET that was replaced; remove it")
        if make_folder(self.work):
            self.inode = own_folder(self.work).st_ino
            return self.inode
        found = own_folder(self.work).st_ino
        # A run that was killed right after making it left it empty.
        if found != self.inode and list_folder(self.work):
            raise TargetError(
                f"{self.work}: not the directory of an interrupted run: its journal does not "
                "speak of it; move it away"
            )
        self.inode = found
        self.require_exact()
        return self.inode

    def require_exact(self) -> None:
        """Refuse a hidden directory with anything in it that TARGET will not hold."""
        folders = {str(parent) for name in self.names for parent in PurePath(name).parents}
        with folder(self.work) as place:
            for base, inner, files, descriptor in os.fwalk(".", dir_fd=place):
                for name in (*inner, *files):
                    where = os.path.normpath(f"{base}/{name}")
                    state = os.stat(name, dir_fd=descriptor, follow_symlinks=False)
                    known = where in (folders if stat.S_ISDIR(state.st_mode) else self.names)
                    if problem := _foreign(state, known):
                        raise ForeignError(f"{self.work / where}: {problem}")

    def other_ranks(self) -> list[int]:
        """The ranks from 1 on whose journals lie beside this one."""
        begin = f"{journal_path(self.target).name}."
        names = list_folder(self.target.parent)
        ends = (name.removeprefix(begin) for name in names if name.startswith(begin))
        return sorted(int(end) for end in ends if end.isdecimal() and end.isascii())

    def discard(self) -> None:
        """Remove what was made, and the journals with it."""
        remove_folder(self.work, self.inode)
        with suppress(TargetError):
            remove_marked(rounded_path(self.target))
        self._remove_journals()

    def _remove_journals(self) -> None:
        # The one that holds the lock goes last: it says whose the others are.
        for rank in (*self.other_ranks(), 0):
            journal_path(self.target, rank).unlink(missing_ok=True)

    def replaces(self) -> int | None:
        """The inode of the TARGET that is there, None without one."""
        return self.target.stat().st_ino if self.target.exists() else None


def _foreign(state: os.stat_result, known: bool) -> str | None:
    """Why something in the hidden directory is none of ours."""
    if stat.S_ISLNK(state.st_mode):
        return "a link, which no conversion makes; remove it"
    if not known:
        return "not of this conversion, in its hidden directory; move it away"
    if stat.S_ISREG(state.st_mode) and state.st_nlink != 1:
        return "has a second name elsewhere (a hard link); remove it"
    return None


@contextmanager
def workspace(target: Path, restart: bool, names: Set[str]) -> Iterator[Workspace]:
    """The place beside TARGET where it is made; a second writer gets TargetError.

    What an interrupted run left is kept for the next one, unless the error says that it is useless.
    """
    work = work_path(target)
    with locked_journal(target) as descriptor:
        fresh = restart or (os.fstat(descriptor).st_size == 0 and not os.path.lexists(work))
        space = Workspace(target, names, descriptor, fresh, marked(descriptor))
        if restart:
            _restart(space)
        try:
            yield space
        except ForeignError:
            raise
        except LinkError as error:
            raise TargetError(str(error)) from None
        except GptossError as error:
            if error.exit_code in _USELESS or (fresh and error.exit_code in _REFUSED):
                space.discard()
            raise


def _restart(space: Workspace) -> None:
    """Discard what an interrupted run left, and nothing else."""
    for rank in space.other_ranks():
        with locked_journal(space.target, rank) as other:
            os.ftruncate(other, 0)
    if os.path.lexists(space.work) and own_folder(space.work).st_ino != space.inode:
        if list_folder(space.work):
            raise TargetError(
                f"{space.work}: not the directory of an interrupted run: its journal does not "
                "speak of it; move it away"
            )
        space.work.rmdir()
    remove_folder(space.work, space.inode)
    remove_marked(rounded_path(space.target))
    os.ftruncate(space.journal, 0)
    space.inode = None

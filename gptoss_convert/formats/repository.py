"""A repository on the Hub, by name and commit: where a checkpoint is from, or goes to."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Repository:
    """A model repository `owner/name` at a revision: a branch, a tag or a commit."""

    name: str
    revision: str | None = None
    """As it was asked for; None is the main branch."""
    commit: str | None = None
    """What the revision named when it was resolved, once."""

    def __str__(self) -> str:
        return self.name

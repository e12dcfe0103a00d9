"""Uploading a finished TARGET to a repository on the Hub."""

from __future__ import annotations

import resource
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptoss_convert.containers.paths import open_inside
from gptoss_convert.errors import NetworkError, UsageError
from gptoss_convert.formats.repository import Repository
from gptoss_convert.hub.client import LOGIN, translated
from gptoss_convert.hub.names import repository, require_endpoint
from gptoss_convert.hub.outline import is_weights
from gptoss_convert.machine.private import own_folder
from gptoss_convert.version import VERSION

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd

_OTHER_FILES = 128
"""Descriptors that uploading itself may take."""


def destination(name: str) -> Repository:
    """The repository to push to, found fit before anything is converted.

    Raises UsageError for what is no repository id and for a repository that holds weights, with
    which TARGET's would mix; NetworkError without a valid login.
    """
    require_endpoint()
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    found = repository(name if name.startswith("hf://") else f"hf://{name}")
    if found is None or found.revision:
        raise UsageError(f"--push-to {name}: expects owner/name")
    with translated(found):
        who = HfApi().whoami()
        try:
            held = [file.rfilename for file in HfApi().model_info(found.name).siblings or ()]
        except RepositoryNotFoundError:
            held = []
    if _role(who) == "read":
        raise NetworkError(
            f"--push-to {found}: this token may only read; {LOGIN} with one to write"
        )
    if weights := sorted(filter(is_weights, held)):
        raise UsageError(
            f"--push-to {found}: holds weights already: {', '.join(weights[:3])}; name another "
            "repository"
        )
    return found


def instead(target: Path, repository: Repository) -> str:
    """What to do where TARGET is there and could not be uploaded, or not be to its end."""
    again = shlex.join(["hf", "upload", repository.name, str(target)])
    return f"{target} is complete, upload it with: {again}"


def _role(who: Any) -> Any:
    """What the Hub says that a token may do: `read`, `write` or `fineGrained`; None if nothing."""
    for key in ("auth", "accessToken", "role"):
        who = who.get(key) if isinstance(who, dict) else None
    return who


def push(target: Path, names: Iterable[str], repository: Repository, public: bool) -> str:
    """Upload these files of TARGET; a repository that does not exist is made. Returns its address.

    Raises TargetError for a TARGET of another user, NetworkError that says how to go on.
    """
    from huggingface_hub import CommitOperationAdd

    own_folder(target)
    with _held(target, sorted(names)) as paths:
        return _upload(target, repository, public, [CommitOperationAdd(*one) for one in paths])


@contextmanager
def _held(target: Path, names: Sequence[str]) -> Iterator[list[tuple[str, str]]]:
    """(name, path) of files that are open: what is at their place by then does not matter."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = len(names) + _OTHER_FILES
    if soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(needed, hard), hard))
    with ExitStack() as held:
        opened = [held.enter_context(open_inside(target, name)) for name in names]
        yield [
            (name, f"/proc/self/fd/{file.fileno()}")
            for name, file in zip(names, opened, strict=True)
        ]


def _upload(
    target: Path, repository: Repository, public: bool, files: Sequence[CommitOperationAdd]
) -> str:
    from huggingface_hub import HfApi

    try:
        with translated(repository):
            made = HfApi().create_repo(repository.name, private=not public, exist_ok=True)
            HfApi().create_commit(
                repository.name,
                files,
                commit_message=f"Upload what gptoss-convert {VERSION} wrote",
            )
    except NetworkError as error:
        raise NetworkError(f"{error}; {instead(target, repository)}") from None
    return str(made)

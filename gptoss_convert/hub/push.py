"""Uploading a finished TARGET to a repository on the Hub."""

from __future__ import annotations

import shlex
from pathlib import Path

from gptoss_convert.errors import NetworkError, UsageError
from gptoss_convert.formats.repository import Repository
from gptoss_convert.hub.client import translated
from gptoss_convert.hub.names import repository
from gptoss_convert.hub.outline import is_weights
from gptoss_convert.version import VERSION


def destination(name: str) -> Repository:
    """The repository to push to, found fit before anything is converted.

    Raises UsageError for what is no repository id and for a repository that holds weights, with
    which TARGET's would mix; NetworkError without a valid login.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    found = repository(name if name.startswith("hf://") else f"hf://{name}")
    if found is None or found.revision:
        raise UsageError(f"--push-to {name}: expects owner/name")
    with translated(found):
        HfApi().whoami()
        try:
            held = [file.rfilename for file in HfApi().model_info(found.name).siblings or ()]
        except RepositoryNotFoundError:
            held = []
    if weights := sorted(filter(is_weights, held)):
        raise UsageError(
            f"--push-to {found}: holds weights already: {', '.join(weights[:3])}; name another "
            "repository"
        )
    return found


def push(target: Path, repository: Repository, public: bool) -> str:
    """Upload every file of TARGET; a repository that does not exist is made. Returns its address.

    Raises NetworkError that says how to go on.
    """
    from huggingface_hub import HfApi

    try:
        with translated(repository):
            made = HfApi().create_repo(repository.name, private=not public, exist_ok=True)
            HfApi().upload_folder(
                repo_id=repository.name,
                folder_path=target,
                commit_message=f"Upload what gptoss-convert {VERSION} wrote",
            )
    except NetworkError as error:
        again = shlex.join(["hf", "upload", repository.name, str(target)])
        raise NetworkError(f"{error}; {target} is complete, upload it with: {again}") from None
    return str(made)

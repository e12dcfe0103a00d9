"""The client's cache: where it lies, what it holds of a repository, and whether more fits."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from gptoss_convert.hub.listing import Listing
from gptoss_convert.machine import resources


def cache_folder(listing: Listing) -> Path:
    """Where the cache keeps a repository."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    name = repo_folder_name(repo_id=listing.repository.name, repo_type="model")
    return Path(constants.HF_HUB_CACHE, name)


def cached(listing: Listing, path: str) -> Path | None:
    """The file in the cache, if it lies there."""
    from huggingface_hub import try_to_load_from_cache

    repository = listing.repository
    found = try_to_load_from_cache(repository.name, path, revision=repository.commit)
    return Path(found) if isinstance(found, str) else None


def require_room(listing: Listing, names: Collection[str]) -> int:
    """The bytes of these files, which the cache's disk must hold; raises DiskError."""
    total = sum(listing.files[name] for name in names)
    if names:
        folders = cache_folder(listing).parents
        resources.check_disk(next(place for place in folders if place.exists()), total)
    return total


def remember(listing: Listing) -> None:
    """Note which commit the revision named, as the client does: it is found offline by that."""
    repository, folder = listing.repository, cache_folder(listing)
    if repository.revision != repository.commit:
        path = folder / "refs" / (repository.revision or "main")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(repository.commit), encoding="ascii")

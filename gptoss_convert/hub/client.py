"""What is asked of huggingface_hub: a listing, the beginning of a file, a file.

Retries, redirects, tokens, the cache and the endpoint are the client's. Its errors become one line.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

from gptoss_convert.containers.budget import ANSWER
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import IntegrityError, NetworkError
from gptoss_convert.errors.secrets import scrub
from gptoss_convert.formats.repository import Repository
from gptoss_convert.hub.bars import limited
from gptoss_convert.hub.guard import MOST, Expected, guarded
from gptoss_convert.hub.listing import Listing, listed, remember_beginning, require_digest
from gptoss_convert.hub.names import require_endpoint, similar

_POINTER = b"version https://git-lfs.github.com/spec/"
_TRIES = 3
LOGIN = "log in with 'hf auth login' or set HF_TOKEN"


def resolve(repository: Repository) -> Listing:
    """The commit that a revision names now, and its files; raises NetworkError.

    With HF_HUB_OFFLINE, what the cache knows.
    """
    require_endpoint()
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return _cached(repository)
    return listed(repository, _model_info(repository), endpoint())


def _model_info(repository: Repository) -> dict[str, Any]:
    """The Hub's description of a revision; HfApi.model_info asks the same, without retries."""
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

    url = f"{endpoint()}/api/models/{repository.name}"
    if revision := repository.commit or repository.revision:
        url += f"/revision/{quote(revision, safe='')}"
    with translated(repository):
        response = http_backoff(
            "GET",
            url,
            params={"blobs": True},
            headers=build_hf_headers(),
            timeout=_timeout(),
            max_retries=_TRIES,
        )
        hf_raise_for_status(response)
        try:
            # JSON is UTF-8, whatever a header says it is.
            return parse_object(str(repository), response.content.decode("utf-8"), ANSWER)
        except (IntegrityError, UnicodeDecodeError):
            return {}


def _cached(repository: Repository) -> Listing:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError, LocalEntryNotFoundError

    try:
        found = snapshot_download(
            repository.name,
            revision=repository.commit or repository.revision,
            local_files_only=True,
        )
    except IncompleteSnapshotError as error:
        found = error.snapshot_path
    except LocalEntryNotFoundError:
        at = f"@{repository.revision}" if repository.revision else ""
        raise NetworkError(
            f"{repository}{at}: not in the cache {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is "
            "set; unset it to download"
        ) from None
    root = Path(found)
    files = {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }
    return Listing(replace(repository, commit=root.name), files, cached_only=True)


def beginning(listing: Listing, path: str, nbytes: int) -> bytes:
    """The first bytes of a file, by one range request; no more is read where ranges are ignored.

    From the cache, where it holds the file. Raises NetworkError.
    """
    from huggingface_hub import try_to_load_from_cache

    repository = listing.repository
    nbytes = min(nbytes, listing.files[path])
    cached = try_to_load_from_cache(repository.name, path, revision=repository.commit)
    if isinstance(cached, str):
        with Path(cached).open("rb") as file:
            content = file.read(nbytes)
        remember_beginning(listing, path, content)
        return content
    for _ in range(_TRIES):
        with translated(repository, path, listing):
            content = _range(listing, path, nbytes) if nbytes else b""
        if len(content) >= nbytes:
            remember_beginning(listing, path, content)
            return content
    raise NetworkError(
        f"{repository}/{path}: connection broke {_TRIES} times; run the same command again"
    )


def _range(listing: Listing, path: str, nbytes: int) -> bytes:
    """The first bytes by one request, fewer if the connection broke."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    repository = listing.repository
    headers = {"Range": f"bytes=0-{nbytes - 1}", "Accept-Encoding": "identity"}
    content = bytearray()
    try:
        with http_stream_backoff(
            "GET",
            hf_hub_url(repository.name, path, revision=repository.commit),
            headers=build_hf_headers() | headers,
            timeout=_timeout(),
            # Broken connections are dealt with here: the client cannot retry an open stream.
            retry_on_exceptions=(),
        ) as response:
            hf_raise_for_status(response)
            for part in response.iter_bytes():
                content += part
                if len(content) >= nbytes:
                    break
    except _http_error() as error:
        if isinstance(error, HfHubHTTPError):
            raise
    if content.startswith(_POINTER):
        raise NetworkError(
            f"{repository}/{path}: the server answered with a Git LFS pointer, not the file"
        )
    return bytes(content[:nbytes])


def download(listing: Listing, path: str, bar: type[Any], folder: Path | None = None) -> Path:
    """A file of the pinned commit, in the cache or in `folder`, with the digest that is listed.

    Raises NetworkError, OSError, and IntegrityError for a file that is not what the Hub lists; it
    does not stay.
    """
    from huggingface_hub import hf_hub_download

    repository = listing.repository
    with translated(repository, path, listing):
        found = Path(
            hf_hub_download(
                repository.name,
                path,
                revision=repository.commit,
                local_dir=folder,
                tqdm_class=limited(bar, listing.files[path], f"{repository}/{path}"),
            )
        )
    try:
        require_digest(listing, path, found)
    except IntegrityError:
        _drop(found)
        raise
    return found


def _drop(file: Path) -> None:
    """Remove a file, and the blob of the cache that it is a link to."""
    blob = file.parent / file.readlink() if file.is_symlink() else file
    for path in (file, blob):
        path.unlink(missing_ok=True)


def endpoint() -> str:
    """The Hub's address, or that of HF_ENDPOINT."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _http_error() -> type[Exception]:
    """What the client's HTTP library raises; which library that is depends on its version."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(kind for kind in HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")


def _invalid_address() -> type[Exception]:
    """What that library raises for an address that is none; no HTTPError of it."""
    return sys.modules[_http_error().__module__.partition(".")[0]].InvalidURL


def _timeout() -> float:
    from huggingface_hub import constants

    return float(constants.HF_HUB_DOWNLOAD_TIMEOUT)


@contextmanager
def translated(
    repository: Repository, path: str | None = None, listing: Listing | None = None
) -> Iterator[None]:
    """Look at what the server answers, of a file as it is listed, and turn what the client raises
    into NetworkError of one line, without tokens or signed URLs."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    _hide_signatures()
    where = f"{repository}/{path}" if path else str(repository)
    size = listing.files[path] if listing and path else None
    expected = Expected(where, repository.commit, size, max(size or 0, MOST))
    try:
        with guarded(expected):
            yield
    except (_http_error(), OfflineModeIsEnabled, HFValidationError) as error:
        raise NetworkError(f"{where}: {_meaning(repository, error)}") from None
    except (OSError, RuntimeError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        cause = error.__cause__ or error
        raise NetworkError(f"{where}: {_meaning(repository, cause)}") from None
    except (ImportError, _invalid_address()) as error:
        said = " ".join(str(error).split())
        raise NetworkError(f"{where}: HF_ENDPOINT or a proxy's address: {said:.200}") from None
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        # The client takes answers for what they should be: one that is no JSON, or lacks a key.
        said = " ".join(str(error).split())
        raise NetworkError(
            f"{where}: {endpoint()} answered what the client cannot use: {said:.200}"
        ) from None


def _hide_signatures() -> None:
    """The client's warnings of retries stay, the secret parts of addresses in them do not."""
    for handler in logging.getLogger("huggingface_hub").handlers:
        if _scrubbed not in handler.filters:
            handler.addFilter(_scrubbed)


def _scrubbed(record: logging.LogRecord) -> bool:
    record.msg, record.args = scrub(record.getMessage()), ()
    return True


def _meaning(repository: Repository, error: BaseException) -> str:
    """What a failure means and what to do about it."""
    from huggingface_hub import errors

    place = endpoint()
    kinds: dict[type[BaseException], Callable[[], str]] = {
        errors.GatedRepoError: lambda: (
            f"gated: accept its conditions at {place}/{repository}, then {LOGIN}"
        ),
        errors.RepositoryNotFoundError: lambda: (
            f"no such repository at {place}, nor a directory of this name"
            f"{similar(repository.name) or f'; if it is private, {LOGIN}'}"
        ),
        errors.RevisionNotFoundError: lambda: (
            f"no revision {repository.revision!r}" if repository.revision else "an empty repository"
        ),
        errors.EntryNotFoundError: lambda: "no such file",
        errors.LocalTokenNotFoundError: lambda: f"not logged in: {LOGIN}",
        errors.OfflineModeIsEnabled: lambda: "not in the cache, and HF_HUB_OFFLINE is set",
    }
    for kind, text in kinds.items():
        if isinstance(error, kind):
            return text()
    if isinstance(error, errors.HfHubHTTPError):
        return _status(error.response.status_code)
    if isinstance(error, _http_error()):
        kind = type(error).__name__
        what = "cannot reach" if kind.startswith(("Connect", "Proxy")) else "connection broke:"
        return f"{what} {place} ({kind}); run the same command again"
    first = (str(error).splitlines() or [type(error).__name__])[0]
    # In brackets the client shows the end of an address, which is its signature.
    return f"failed: {first.partition(' (')[0]:.200}"


def _status(code: int) -> str:
    """What an HTTP status means that has no error class of its own."""
    if code == 401:
        return f"not authorised (401): {LOGIN}"
    if code == 403:
        return "access refused (403): the token lacks the permission"
    if code == 429:
        return f"too many requests (429), after retries: wait, or {LOGIN} for a higher limit"
    return f"the server answered {code}; run the same command again"

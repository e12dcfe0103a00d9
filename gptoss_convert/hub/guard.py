"""What a server may say: each answer is looked at before the client makes use of it.

The client puts an answer's ETag and commit into paths, waits as long as it is told, and reads
whatever comes. Here every answer passes by first, redirects included.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from gptoss_convert.containers.budget import ANSWER
from gptoss_convert.errors import NetworkError
from gptoss_convert.hub.listing import COMMIT

_ETAG = re.compile(r'(?:W/)?"?[A-Za-z0-9][A-Za-z0-9_.+=:~-]{0,127}"?')
"""What becomes a blob's name in the cache, and so must be no path; elsewhere it is not used."""
_STORED = re.compile(r"[0-9a-fA-F]{64}")
_HUB = "https://huggingface.co"
"""Where mirrors, too, say that files are, for the client to put their own address in its place."""
_PORTS = {"http": 80, "https": 443}
_LONGEST_WAIT = 300
"""Seconds that a server may ask to wait; the Hub counts requests in windows of five minutes."""
_WINDOW = 60.0
_LEAST = 60_000
"""Bytes that must come in each window of so many seconds: a modem sends more."""
MOST = ANSWER.nbytes
"""Bytes of an answer that is no file."""


@dataclass(frozen=True)
class Expected:
    """What is known of an answer before it comes."""

    where: str
    commit: str | None = None
    size: int | None = None
    """Of the file that is asked for."""
    most: int = MOST
    """Bytes of the body."""


_expected: ContextVar[Expected | None] = ContextVar("expected", default=None)


@contextmanager
def guarded(expected: Expected) -> Iterator[None]:
    """Within it, in this thread, answers to the client are looked at; they raise NetworkError."""
    _install()
    token = _expected.set(expected)
    try:
        yield
    finally:
        _expected.reset(token)


def _install() -> None:
    """Put the guard into every connection that the client makes, whoever configures those."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import _http

    # Whoever imports this package may have set another.
    make = getattr(_http, "_GLOBAL_CLIENT_FACTORY", _http.default_client_factory)
    if not isinstance(make, _Guarding):
        set_client_factory(_Guarding(make))


class _Guarding:
    """A maker of clients that pass their requests and answers by the guard."""

    def __init__(self, make: Callable[[], Any]) -> None:
        self._make = make

    def __call__(self) -> Any:
        """A client."""
        client = self._make()
        hooks = {kind: list(some) for kind, some in client.event_hooks.items()}
        hooks["request"] = [*hooks.get("request", ()), _asked]
        hooks["response"] = [_answered, *hooks.get("response", ())]
        client.event_hooks = hooks
        return client


def _asked(request: Any) -> None:
    """Ask for the bytes as they are: what is compressed can grow without end. The token goes to the
    Hub alone, whoever sent us on."""
    if _expected.get() is None:
        return
    from huggingface_hub import get_token

    request.headers["Accept-Encoding"] = "identity"
    token, said = get_token(), request.headers.get("Authorization", "")
    if token and token in said and not _is_hub(str(request.url)):
        del request.headers["Authorization"]


def _is_hub(url: str) -> bool:
    """Whether an address is the Hub's, or of whoever stands for it."""
    from huggingface_hub import constants

    return any(_origin(url) == _origin(hub) for hub in (constants.ENDPOINT, _HUB))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    """Scheme, host and port of an address; the same for all that is none."""
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname, parts.port or _PORTS.get(parts.scheme)
    except ValueError:
        return "", None, None


def _answered(response: Any) -> None:
    expected = _expected.get()
    if expected is None:
        return
    headers = response.headers
    _check_names(expected, headers, response.request.method == "HEAD")
    _check_sizes(expected, headers)
    _check_wait(expected, headers)
    _check_store(expected, response)
    if headers.get("content-encoding", "identity") not in ("", "identity"):
        raise NetworkError(f"{expected.where}: the server compresses what was asked for as it is")
    response.stream = _bounded(response.stream, _library(response), expected)


def _check_names(expected: Expected, headers: Mapping[str, str], describes: bool) -> None:
    for name in ("etag", "x-linked-etag") if describes else ():
        if (found := headers.get(name)) is not None and not _ETAG.fullmatch(found):
            raise NetworkError(f"{expected.where}: the server answered with the ETag {found!r:.80}")
    commit = headers.get("x-repo-commit")
    wanted = expected.commit
    if commit is not None and (not COMMIT.fullmatch(commit) or wanted not in (None, commit)):
        raise NetworkError(
            f"{expected.where}: the server answered with commit {commit!r:.80}"
            + (f", expected {wanted}" if wanted else "")
        )


def _check_sizes(expected: Expected, headers: Mapping[str, str]) -> None:
    total = headers.get("content-range", "").rpartition("/")[2]
    for found in (headers.get("x-linked-size"), None if total in ("", "*") else total):
        wrong = found is not None and (not re.fullmatch(r"\d{1,16}", found))
        if wrong or (found and expected.size is not None and int(found) != expected.size):
            raise NetworkError(
                f"{expected.where}: the server has {found!s:.40} bytes, the Hub lists "
                f"{expected.size}"
            )


def _check_store(expected: Expected, response: Any) -> None:
    """Where a file lies in Xet's store, if there: the client sends the token to that address, and
    uses the hash as a name."""
    found = response.headers.get("x-xet-hash")
    if found is None:
        return
    try:
        linked = response.links.get("xet-auth", {}).get("url")
    except ValueError:
        linked = ""
    for route in (linked, response.headers.get("x-xet-refresh-route")):
        if not _STORED.fullmatch(found) or not (route is None or _is_hub(route)):
            raise NetworkError(
                f"{expected.where}: the server names a store elsewhere, or no hash: "
                f"{route!r:.80}, {found!r:.80}"
            )


def _check_wait(expected: Expected, headers: Any) -> None:
    """Refuse to wait for hours; the client would, without a word."""
    asked = headers.get("retry-after", "").strip()
    windows = re.findall(r"\bt=(\d+)", headers.get("ratelimit", ""))
    longest = max((int(one[:9]) for one in (asked, *windows) if one.isdecimal()), default=0)
    if longest > _LONGEST_WAIT:
        raise NetworkError(
            f"{expected.where}: the server asks to wait {longest} seconds; run the same command "
            "again then"
        )


def _library(response: Any) -> Any:
    """The HTTP library of the client; which one that is depends on its version."""
    return sys.modules[type(response).__module__.partition(".")[0]]


def _bounded(stream: Any, library: Any, expected: Expected) -> Any:
    """The body, no longer than it may be and not slower than anybody would wait for."""

    class Bounded(library.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            total = arrived = 0
            began = time.monotonic()
            for piece in stream:
                total += len(piece)
                arrived += len(piece)
                if total > expected.most:
                    raise NetworkError(
                        f"{expected.where}: the server sends more than {expected.most} bytes"
                    )
                now = time.monotonic()
                if now - began >= _WINDOW:
                    if arrived < _LEAST:
                        raise NetworkError(
                            f"{expected.where}: the server sent {arrived} bytes in "
                            f"{now - began:.0f} seconds; run the same command again"
                        )
                    began, arrived = now, 0
                yield piece

        def close(self) -> None:
            stream.close()

    return Bounded()

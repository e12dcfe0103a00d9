"""JSON over HTTP with a server that is not trusted: bounded bytes, values and time, no redirects.

The key goes into one header, to the address that was given, and nowhere else.
"""

from __future__ import annotations

import io
import json
import re
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from socket import socket
from typing import Any, cast
from urllib.parse import urlsplit

from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError, NetworkError, UsageError
from gptoss_convert.errors.secrets import keep
from gptoss_convert.version import VERSION

_CONNECT_SECONDS = 15.0
_TRIES = 4
_LONGEST_WAIT = 20.0
"""Seconds that a server may ask to wait before another try."""
_SMALL = 1 << 20
"""Bytes of an answer that holds no log probabilities."""
_PIECE = 1 << 16
_SHOWN = 160
"""Characters that are shown of what a server says."""
_SECRET = 6
"""Characters of a key that may not be shown one after another."""


class FailedError(NetworkError):
    """The server was reached, and failed."""


@dataclass(frozen=True)
class Room:
    """How large an answer may be: everything beyond is refused while it is read."""

    nbytes: int = _SMALL
    values: int = 20_000
    """JSON values, which take memory however short they are."""

    @classmethod
    def of(cls, positions: int, top: int) -> Room:
        """Enough for `top` tokens with their texts and bytes at each of `positions`."""
        entries = positions * (top + 2)
        return cls(_SMALL + 400 * entries, 20_000 + 50 * entries)


@dataclass(frozen=True)
class Reply:
    """An answer of the server: its status, and its JSON object if it is one."""

    status: int
    content: Mapping[str, Any]


@dataclass(frozen=True)
class Address:
    """Where a server listens: `http://host:port/prefix`."""

    secure: bool
    host: str
    port: int | None
    prefix: str

    @classmethod
    def of(cls, url: str) -> Address:
        """Parse a URL, with or without `/v1`; UsageError for what may hold a secret or no host."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError:
            raise UsageError("--served: expects http://HOST:PORT, found no such address") from None
        if parts.username is not None or parts.password is not None:
            raise UsageError("--served: the address holds a name or password; use --api-key-env")
        if parts.query or parts.fragment:
            raise UsageError("--served: expects an address without ? and #; use --api-key-env")
        if parts.scheme not in {"http", "https"} or not host or not re.fullmatch(r"[!-~]+", url):
            raise UsageError("--served: expects http://HOST:PORT or https://HOST:PORT")
        prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
        return cls(parts.scheme == "https", host, port, prefix)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port is not None else ""
        return f"http{'s' if self.secure else ''}://{host}{port}{self.prefix}"


class Connection:
    """Requests to one server, each on a connection of its own."""

    def __init__(
        self,
        url: str,
        key: str | None = None,
        seconds: float = 300.0,
        sleep: Callable[[float], None] = time.sleep,
    ):
        """`seconds` bound each try of a request, however the server spends them."""
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise UsageError("the API key: expects printable ASCII without spaces")
        self.address = Address.of(url)
        self.tries = _TRIES
        self._key, self._seconds, self._sleep = key, seconds, sleep
        keep(key)

    @property
    def notes(self) -> list[str]:
        """What a person should know about the connection."""
        local = self.address.host in ("localhost", "::1") or self.address.host.startswith("127.")
        if self._key and not self.address.secure and not local:
            return ["the API key went to the server unencrypted, by http"]
        return []

    def get(self, path: str) -> Reply:
        """Ask for a small object."""
        return self._answer("GET", path, None, Room())

    def post(self, path: str, content: Mapping[str, Any], room: Room) -> Reply:
        """Send an object, and read one that fits into `room`.

        A refusal (400 to 499) is a reply too. Raises NetworkError where the server cannot be
        reached, refuses the key or is too slow, FailedError where it fails again and again,
        InputError if it answers no JSON object or too much.
        """
        return self._answer("POST", path, json.dumps(content).encode(), room)

    def shown(self, text: str) -> str:
        """A server's text as it may be shown: short, in one line, and no part of the key in it."""
        line, key = " ".join(text.split()), (self._key or "").lower()
        parts = {key[n : n + _SECRET] for n in range(max(1, len(key) - _SECRET + 1))} - {""}
        if any(part in line.lower() for part in parts):
            return "(not shown: it repeats the key)"
        return line if len(line) <= _SHOWN else f"{line[:_SHOWN]} ..."

    def _answer(self, method: str, path: str, body: bytes | None, room: Room) -> Reply:
        where = f"{self.address}{path}"
        why, wait, kind = "", 0.0, NetworkError
        for turn in range(self.tries):
            if turn:
                self._sleep(max(wait, 0.5 * 2**turn))
            try:
                status, headers, content = self._once(method, path, body, room)
            except (OSError, HTTPException) as error:
                if isinstance(error, ssl.SSLCertVerificationError):
                    raise NetworkError(f"{where}: {error.verify_message}") from None
                if isinstance(error, TimeoutError):
                    raise NetworkError(
                        f"{where}: no whole answer within {self._seconds:g} s; raise --timeout if "
                        "the server is only slow"
                    ) from None
                why, wait, kind = _failure(error), 0.0, NetworkError
                continue
            if 300 <= status < 400:
                raise NetworkError(f"{where}: redirects elsewhere ({status}); give that address")
            if status in (401, 403):
                known = "the key is not accepted" if self._key else "pass a key by --api-key-env"
                raise NetworkError(f"{where}: access refused ({status}): {known}")
            if status != 429 and status < 500:
                return Reply(status, self._object(where, status, content, headers, room))
            why, wait = self._busy(status, content), _seconds(headers.get("retry-after", ""))
            kind = FailedError
        times = f", {self.tries} times" if self.tries > 1 else ""
        raise kind(f"{where}: {why}{times}; run the same command again")

    def _once(
        self, method: str, path: str, body: bytes | None, room: Room
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One try: status, headers by their names in lower case, and body."""
        at = self.address
        deadline = time.monotonic() + self._seconds
        timeout = min(_CONNECT_SECONDS, self._seconds)
        kind = HTTPSConnection if at.secure else HTTPConnection
        connection = kind(at.host, at.port, timeout=timeout)
        connection.connect()
        raw = connection.sock
        try:
            connection.sock = _Timed(raw, deadline)
            headers = {"Accept-Encoding": "identity", "Connection": "close"}
            headers["User-Agent"] = f"gptoss-convert/{VERSION}"
            if body is not None:
                headers["Content-Type"] = "application/json"
            if self._key:
                headers["Authorization"] = f"Bearer {self._key}"
            connection.request(method, at.prefix + path, body, headers)
            response = connection.getresponse()
            found = {name.lower(): value for name, value in response.getheaders()}
            # Of a failure the beginning is enough.
            most = room.nbytes if response.status < 400 else _SMALL
            return response.status, found, _body(response, f"{at}{path}", most)
        finally:
            raw.close()

    def _object(
        self, where: str, status: int, content: bytes, headers: Mapping[str, str], room: Room
    ) -> Mapping[str, Any]:
        """The JSON object of a body; of a refusal whatever it says, under `error`.

        Nothing at all holds nothing: so does mlx-lm list its models where there is no cache.
        """
        if not content.strip():
            return {}
        try:
            text = content.decode("utf-8")
            # Each value follows one of these, so that many are seen before they take memory.
            if sum(map(text.count, ",[{")) > room.values:
                raise InputError(f"{where}: answered more values than were asked for")
            return parse_object(where, text)
        except (UnicodeDecodeError, IntegrityError) as error:
            if status >= 400:
                return {"error": content.decode("utf-8", "replace")}
            kind = headers.get("content-type", "")
            if "html" in kind or content.lstrip()[:1] == b"<":
                raise InputError(
                    f"{where}: answered a web page, not JSON; is this a model server's address?"
                ) from None
            found = str(error) if isinstance(error, IntegrityError) else f"{where}: not UTF-8"
            raise InputError(self.shown(found)) from None

    def _busy(self, status: int, content: bytes) -> str:
        told = self.shown(content.decode("utf-8", "replace"))
        what = "too many requests (429)" if status == 429 else f"the server failed ({status})"
        return f"{what}: {told}" if told else what


def _body(response: HTTPResponse, where: str, most: int) -> bytes:
    """The body; InputError beyond `most` bytes, whatever the headers promised."""
    if response.length is not None and response.length > most:
        raise InputError(f"{where}: announces {response.length} bytes, {most} are enough")
    content = bytearray()
    while piece := response.read1(_PIECE):
        content += piece
        if len(content) > most:
            raise InputError(f"{where}: answered more than {most} bytes")
    if response.length:
        raise HTTPException(f"{response.length} bytes are missing")
    return bytes(content)


def _failure(error: OSError | HTTPException) -> str:
    if isinstance(error, ConnectionRefusedError):
        return "nothing listens there"
    if isinstance(error, HTTPException):
        # Its text may repeat whatever the server sent.
        return f"not HTTP ({type(error).__name__})"
    return f"connection failed ({error.strerror or type(error).__name__})"


def _seconds(text: str) -> float:
    """Seconds to wait, as a header says them."""
    return min(float(text), _LONGEST_WAIT) if re.fullmatch(r"\d{1,6}", text.strip()) else 0.0


class _Timed:
    """A socket whose every send and receive ends by a deadline, even if a byte comes at a time."""

    def __init__(self, sock: socket, deadline: float):
        self._socket, self._deadline = sock, deadline

    def _limit(self) -> socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket

    def sendall(self, content: bytes) -> None:
        """Send all of it."""
        self._limit().sendall(content)

    def recv_into(self, buffer: memoryview) -> int:
        """Receive what has come."""
        return self._limit().recv_into(buffer)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What `http.client` reads from."""
        return io.BufferedReader(cast(io.RawIOBase, _Received(self)))

    def close(self) -> None:
        """Leave it open: the library closes it before it has read an answer that ends with it."""


class _Received(io.RawIOBase):
    """The bytes that a socket receives."""

    def __init__(self, sock: _Timed):
        self._sock = sock

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes into `buffer`, at least one unless the connection has ended."""
        return self._sock.recv_into(memoryview(buffer))

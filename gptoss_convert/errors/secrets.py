"""What no output may show: passwords, tokens and the signed part of addresses."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

HIDDEN = "***"
_ADDRESS = re.compile(r"(https?:/|(?<=:/)/)([^\s\"'<>\\]+)", re.IGNORECASE)
"""Of an address that was taken for a path, one of its two slashes is left."""
_TOKEN = re.compile(r"(?:hf_|api_org_)[A-Za-z0-9]{20,}|(?<=[Bb]earer )[!-~]+")
_QUERY = re.compile(r"(?<=[\w./-])\?[\w.%~-]+=[^\s\"'<>)\]]+")
"""A query whose address was cut off by whoever shortened it."""
_HINTS = ("hf_", "api_org_", "earer ")
"""Without one of these a text holds no token: looked for first, as it takes no time."""
_NAMED = re.compile(
    r"(?:.*_)?(?:TOKEN|PASSWORD|PASSWD|SECRET|SECRET_KEY|SECRET_ACCESS_KEY|API_?KEY)", re.IGNORECASE
)
"""How environment variables are called that hold nothing but a secret."""
_PROXY = re.compile(r"(?:.*_)?PROXY", re.IGNORECASE)
"""How variables are called whose addresses may lack a scheme."""
_ANSWERS = re.compile(r"(?:https?|socks\w*|ftp)://", re.IGNORECASE)
"""How an address in an environment variable begins that may hold a password."""
_LEAST = 6
"""Characters of a secret that is looked for by itself: a shorter one would be found in any text."""
_MOST = 4096
_kept: set[str] = set()


def keep(secret: str | None) -> None:
    """Hide this text from now on, wherever `scrub` is used."""
    if secret:
        _kept.add(secret)


def scrub(text: str) -> str:
    """The text without secrets, `***` in their places.

    Secrets are the names, passwords and queries of addresses, tokens of the Hub, what the
    environment holds under a name that says so, or in an address, and what was to be kept.
    """
    for secret in _known():
        text = text.replace(secret, HIDDEN)
    if ":/" in text:
        text = _ADDRESS.sub(_bare, text)
    if "?" in text:
        text = _QUERY.sub(f"?{HIDDEN}", text)
    return _TOKEN.sub(HIDDEN, text) if any(hint in text for hint in _HINTS) else text


def holds_secret(text: str) -> bool:
    """Whether a text that is to be published holds a token, or what was to be kept."""
    return bool(_TOKEN.search(text)) or any(one in text for one in _known())


def nameable(value: Any) -> Any:
    """Plain data that is to be published, with the last part in place of each local path: the rest
    is nobody's business, and means nothing elsewhere."""
    if isinstance(value, Mapping):
        return {key: nameable(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [nameable(one) for one in value]
    local = isinstance(value, str) and value.startswith(("/", "~", "../"))
    return PurePath(value).name if local else value


def _bare(found: re.Match[str]) -> str:
    """An address without name and password, query and fragment."""
    scheme, rest = found.groups()
    host = rest.lstrip("/")
    scheme, rest = scheme + "/" * (len(rest) - len(host)), host
    end = min((at for mark in "?#" if (at := rest.find(mark)) >= 0), default=len(rest))
    rest = rest[:end] + (f"{rest[end]}{HIDDEN}" if end + 1 < len(rest) else rest[end:])
    host, slash, path = rest.partition("/")
    _, at, host = host.rpartition("@")
    return f"{scheme}{HIDDEN * bool(at)}{at}{host}{slash}{path}"


def _known() -> list[str]:
    """Secrets by themselves, the longest first: one may be a part of another."""
    found = {*_kept}
    for name, value in os.environ.items():
        if len(value) <= _MOST:
            if _NAMED.fullmatch(name):
                found.add(value)
            elif "@" in value and (_ANSWERS.match(value) or _PROXY.fullmatch(name)):
                found |= _credentials(value)
    return sorted((one for one in found if len(one) >= _LEAST), key=len, reverse=True)


def _credentials(value: str) -> set[str]:
    """What stands before the last @ of an address, in whole and in parts, as written and decoded.

    It may hold characters that end the host for whoever reads the address by the rules.
    """
    from urllib.parse import unquote

    before, scheme, behind = value.partition("://")
    whole = (behind if scheme else before).rpartition("@")[0]
    password = whole.partition(":")[2]
    return {whole, password, unquote(whole), unquote(password)}

"""What lies under a file's name and is another thing, by how it begins: for every container."""

from __future__ import annotations

import re

LOOKED_AT = 1024
"""Bytes of a file's beginning that tell."""
_POINTER = b"version https://git-lfs.github.com/spec/"
_PAGE = (b"<!doctype", b"<html", b"<?xml", b"<error")


def disguise(head: bytes, size: int, what: str = "") -> str | None:
    """What a file of `size` bytes that begins so is, and what helps; None where nothing tells.

    `what` it should be: nothing for text, which may be JSON, or the name of a container.
    """
    other = f", not {what}" if what else ""
    if not size:
        return "empty file"
    if head.startswith(_POINTER):
        wanted = re.search(rb"\nsize (\d{1,20})\n", head) if what else None
        expects = f", not weights (expects {int(wanted[1])} bytes)" if wanted else ""
        return f"a Git LFS pointer{expects}; fetch the file: git lfs pull"
    if head.lstrip()[:9].lower().startswith(_PAGE):
        return f"looks like an HTML page{other}; download it again"
    if head[:2] == b"\x1f\x8b" or head[:4] == b"PK\x03\x04":
        return f"a compressed archive{other}; unpack it first"
    if what and head[:1] == b"{":
        return f"looks like JSON text{other}; download it again"
    return None

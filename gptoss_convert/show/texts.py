"""Texts that leave as files: without secrets, in UTF-8 whatever names they repeat, and whole."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from gptoss_convert.errors import DiskError, UsageError
from gptoss_convert.errors.refusals import disk_error
from gptoss_convert.errors.secrets import scrub

_NOT_IN_XML = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
"""As text: compiling so many characters takes longer than importing all else here."""
_IN_PLACE = {errno.EACCES, errno.EPERM, errno.EBUSY}
"""What the system answers where a file may be written and not replaced, as one that is mounted."""


def require_place(option: str, path: Path) -> None:
    """Raise UsageError or DiskError where no text can be written: it is known before the work."""
    if path.is_dir():
        raise UsageError(f"{option} {path}: a directory; name a file in it")
    if not path.parent.is_dir():
        raise UsageError(f"{option} {path}: no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise DiskError(f"{option} {path}: no permission to write")


def write_text(path: Path, text: str) -> None:
    """Write a text for people or programs; half a character, of a name that is no UTF-8, is shown
    as its number. The file is whole, or as it was before. Raises DiskError.
    """
    content = scrub(text).encode("utf-8", "backslashreplace")
    try:
        if path.exists() and not path.is_file():
            # A pipe or a terminal takes the bytes as they come.
            path.write_bytes(content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except OSError as error:
        raise disk_error(path, error) from None


def _replace(path: Path, content: bytes) -> None:
    beside = path.with_name(f".gptoss-convert-{os.urandom(8).hex()}")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    try:
        with os.fdopen(os.open(beside, flags, 0o644), "wb") as file:
            file.write(content)
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        if error.errno not in _IN_PLACE or not path.is_file():
            raise
        path.write_bytes(content)


def in_xml(text: str) -> str:
    """The text with what XML cannot hold, not even escaped, as Python writes it."""
    return re.sub(_NOT_IN_XML, lambda found: repr(found[0])[1:-1], text)

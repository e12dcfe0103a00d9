"""Small files: read piece by piece, written at once; and directories, whose entries are synced."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from isal import isal_zlib

from gptoss_convert.containers import Content
from gptoss_convert.containers.paths import create_inside, open_file
from gptoss_convert.containers.walk import folder
from gptoss_convert.errors import IntegrityError
from gptoss_convert.errors.refusals import disk_error
from gptoss_convert.machine.failures import UNSUPPORTED
from gptoss_convert.machine.files import Places, moved

_PIECE = 4 << 20


def pieces(content: Content, places: Places) -> Iterator[bytes]:
    """A small file's content, piece by piece; raises IntegrityError if a copied file changed."""
    if isinstance(content, bytes):
        yield content
        return
    file, left = content.file, content.size
    with open_file(moved(file, places)) as stream:
        while piece := stream.read(_PIECE):
            left -= len(piece)
            yield piece
    if left:
        raise IntegrityError(f"{file}: {content.size} bytes when the plan was made, now {-left:+}")


def write_file(root: Path, name: str, content: Iterable[bytes]) -> int:
    """Write a small file anew and wait until it is on the disk; returns its CRC-32."""
    crc = 0
    try:
        descriptor = create_inside(root, name, os.O_WRONLY)
        try:
            os.ftruncate(descriptor, 0)
            for piece in content:
                crc = isal_zlib.crc32(piece, crc)
                left = memoryview(piece)
                while left:
                    left = left[os.write(descriptor, left) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise disk_error(root / name, error) from None
    return crc


def sync_directory(path: Path) -> None:
    """Wait until the directory's entries are on the disk."""
    with folder(path) as place:
        descriptor = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=place)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise disk_error(path, error) from None
    finally:
        os.close(descriptor)

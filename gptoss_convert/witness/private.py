"""What an oracle loads: a directory of this account alone, made of what was read and checked.

The libraries that oracles call unpickle, follow links and open files by name, long after they were
checked. They get a temporary directory instead: small files are written anew from what was parsed,
and weights are the very files that are open, by links to their descriptors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from gptoss_convert.containers import Chunk
from gptoss_convert.containers.paths import open_file, settled
from gptoss_convert.containers.refs import FileRef


@contextmanager
def private_copy(
    root: Path, chunks: Iterable[Chunk], written: Mapping[str, bytes]
) -> Iterator[Path]:
    """A directory with the files of these chunks and what is written beside them.

    Raises IntegrityError for a file that is not the one whose header was read.
    """
    files = {chunk.file: FileRef(root, chunk.file, chunk.identity) for chunk in chunks}
    with ExitStack() as held, TemporaryDirectory(prefix="gptoss-convert-oracle-") as made:
        place = settled(Path(made))
        for name, file in files.items():
            path = place / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(f"/proc/self/fd/{held.enter_context(open_file(file)).fileno()}")
        for name, content in written.items():
            (place / name).write_bytes(content)
        yield place

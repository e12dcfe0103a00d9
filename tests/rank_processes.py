"""Several ranks of one conversion in forked children, connected as torchrun's ranks are.

No torch: a launch takes a fraction of a second, so that a rank can be killed at many points.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.conversion.run import run
from gptoss_convert.errors import GptossError
from gptoss_convert.machine.ranks import Ranks


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status (minus a signal's number) and its last words."""

    status: int
    words: str


def run_ranks(
    conversion: Conversion,
    size: int,
    *,
    local_size: int | None = None,
    in_child: Callable[[Ranks], object] = lambda ranks: None,
) -> list[Ended]:
    """Convert with so many ranks, `local_size` of them on each pretended machine."""
    pairs = [_pair() for _ in range(1, size)]
    children: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        words = [Path(folder) / str(rank) for rank in range(size)]
        for rank in range(size):
            child = os.fork()
            if child == 0:
                ranks = Ranks(rank, size, rank % (local_size or size), local_size or size)
                _child(conversion, ranks, pairs, words[rank], in_child)
            children.append(child)
        for pair in pairs:
            for end in pair:
                end.close()
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said = [path.read_text() if path.exists() else "" for path in words]
    return [Ended(status, text) for status, text in zip(statuses, said, strict=True)]


def _pair() -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection: rank 0's and the other rank's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        end = socket.create_connection(server.getsockname())
        return server.accept()[0], end


def _child(
    conversion: Conversion,
    ranks: Ranks,
    pairs: list[tuple[socket.socket, socket.socket]],
    words: Path,
    in_child: Callable[[Ranks], object],
) -> NoReturn:
    status = 99
    try:
        mine = {n: pair[0] for n, pair in enumerate(pairs, start=1)}
        if ranks.rank:
            mine = {0: pairs[ranks.rank - 1][1]}
        for end in (end for pair in pairs for end in pair):
            # The end of a process shows only if nobody else holds its connection.
            if end not in mine.values():
                end.close()
        with ranks:
            ranks.connect(mine)
            in_child(ranks)
            run(conversion, ranks=ranks)
        status = 0
    except GptossError as error:
        words.write_text(str(error))
        ranks.fail(str(error), error.exit_code)
        status = error.exit_code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)

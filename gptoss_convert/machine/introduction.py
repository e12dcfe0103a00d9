"""How the ranks of one run find one another: through torchrun's store, in a short-lived process.

Only that process imports torch (docs/decisions/0007-ranks.md).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import gptoss_convert

_PATIENCE = 300.0
"""Seconds in which all ranks must have found one another."""
_SILENCE = 10
"""Seconds that a connection may take to say which rank it is."""
_KEY = "gptoss-convert"
_INTRODUCTION = f"from {__name__} import introduce; introduce()"


def accepted(size: int) -> dict[int, socket.socket]:
    """A connection from every other rank to this one, rank 0; raises OSError if one does not come.

    The first line on each is the run's secret and a rank.
    """
    secret = secrets.token_hex(16)
    peers: dict[int, socket.socket] = {}
    deadline = time.monotonic() + _PATIENCE
    with socket.create_server(("", 0), backlog=size) as server:
        server.settimeout(1.0)
        with _introduction(json.dumps([server.getsockname()[1], secret])) as child:
            while len(peers) < size - 1:
                if child.poll() is not None or time.monotonic() > deadline:
                    raise OSError(f"{size - 1 - len(peers)} of the others did not come")
                try:
                    connection, _ = server.accept()
                except TimeoutError:
                    continue
                connection.settimeout(_SILENCE)
                rank = _greeting(connection, secret)
                if rank is None or rank in peers or not 0 < rank < size:
                    connection.close()
                else:
                    peers[rank] = connection
    return dict(sorted(peers.items()))


def _greeting(connection: socket.socket, secret: str) -> int | None:
    """The rank that a connection says it is, None for a stranger."""
    expected = len(secret) + 8
    text = b""
    with suppress(OSError):
        while len(text) < expected and (piece := connection.recv(expected - len(text))):
            text += piece
    said, _, rank = text.partition(b" ")
    known = secrets.compare_digest(said, secret.encode()) and rank.isdigit()
    return int(rank) if known else None


def connected(rank: int) -> socket.socket:
    """A connection of this rank to rank 0; raises OSError or ValueError without one."""
    with _introduction("") as child:
        assert child.stdout is not None
        line = child.stdout.readline()
    if not line:
        raise OSError("torchrun's store did not tell where rank 0 is")
    port, secret = json.loads(line)
    connection = socket.create_connection((os.environ["MASTER_ADDR"], port), _PATIENCE)
    connection.sendall(f"{secret} {rank:07d}".encode())
    return connection


@contextmanager
def _introduction(told: str) -> Iterator[subprocess.Popen[bytes]]:
    """A child process with torch, which hands rank 0's port and secret to the other ranks."""
    home = str(Path(gptoss_convert.__file__).parent.parent)
    paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", _INTRODUCTION, told],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )
    try:
        yield child
    except BaseException:
        child.kill()
        raise
    finally:
        child.communicate()


def introduce() -> None:
    """What the child does: set or get one value in torchrun's store, then wait to be let go."""
    from datetime import timedelta

    from torch.distributed.rendezvous import rendezvous

    try:
        meeting = rendezvous("env://", timeout=timedelta(seconds=_PATIENCE))
        store, rank, _ = next(meeting)
        if rank == 0:
            store.set(_KEY, sys.argv[1])
        else:
            print(store.get(_KEY).decode(), flush=True)
    except RuntimeError as error:
        sys.exit(str(error).partition("\n")[0])
    sys.stdin.read()

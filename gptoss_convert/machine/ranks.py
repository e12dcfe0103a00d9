"""The ranks of one run: processes that torchrun started, and how they speak to one another.

Every rank holds a connection to rank 0 over which plain JSON values travel, a line each. Whoever
fails says so; whoever is killed is noticed by the end of its connection: either way rank 0 tells
the others, whose next call raises RankError.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from gptoss_convert.errors import EXIT_LOST, NetworkError, RankError, UsageError
from gptoss_convert.errors.secrets import scrub
from gptoss_convert.machine.terminal import printable

if TYPE_CHECKING:
    import socket

_SILENCE = 10
"""Seconds without an answer after which a machine counts as gone."""
_GRACE = 5.0
"""Seconds in which a rank may end by itself when another one has failed."""
_RUN = "TORCHELASTIC_RUN_ID"
"""What torchrun alone sets: RANK and WORLD_SIZE stand in the environment of many jobs."""


class Ranks:
    """The ranks of this run as one of them sees it; alone, every call answers at once."""

    def __init__(
        self, rank: int = 0, size: int = 1, local_rank: int = 0, local_size: int = 1
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        """This rank's number among those of its machine: which GPU is its own."""
        self.local_size = local_size
        self.host = os.uname().nodename
        self._peers: dict[int, _Peer] = {}
        self._told = threading.Condition()
        self._values: dict[int, deque[Any]] = {}
        self._failure: RankError | None = None
        self._left = False
        self.log: TextIO | None = None
        """Where this rank's words go, too."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.leave()
            if self.log:
                self.log.close()
                self.log = None

    def keep_log(self, folder: Path) -> None:
        """Write this rank's words to a file of its own in a folder; raises OSError."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"rank-{self.rank:05d}.log"
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
        self.log = os.fdopen(os.open(path, flags, 0o644), "a", 1, "utf-8")
        who = f"rank {self.rank} of {self.size} on {self.host}, process {os.getpid()}:"
        print(who, scrub(" ".join(sys.argv[1:])), file=self.log)

    def note(self, text: str) -> None:
        """Write a line to this rank's log, if it keeps one."""
        if self.log:
            print(printable(scrub(text)), file=self.log)

    def connect(self, peers: Mapping[int, socket.socket]) -> None:
        """Speak through these connections from now on: to every rank from rank 0, else to it."""
        for rank, connection in peers.items():
            self._peers[rank] = _Peer(connection)
            self._values[rank] = deque()
        for rank in self._peers:
            threading.Thread(target=self._listen, args=(rank,), daemon=True).start()

    def name_hosts(self, hosts: Sequence[str]) -> None:
        """Know the other ranks' machines by name, for messages."""
        for rank, peer in self._peers.items():
            peer.host = hosts[rank]

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order, on every rank; raises RankError."""
        if self.rank:
            self._send(0, {"value": value})
            return self._receive(0)
        values = [value, *(self._receive(rank) for rank in self._peers)]
        self._send_all({"value": values})
        return values

    def broadcast(self, value: Any = None) -> Any:
        """Rank 0's value, on every rank; raises RankError."""
        if self.rank:
            return self._receive(0)
        self._send_all({"value": value})
        return value

    def barrier(self) -> None:
        """Wait until every rank has come here; raises RankError."""
        self.gather(None)

    def check(self) -> None:
        """Raise RankError if another rank has failed; cheap enough for every step."""
        if self._failure is not None:
            raise self._failure

    def failure(self, within: float) -> RankError | None:
        """Why another rank failed, if that is known within so many seconds."""
        with self._told:
            if self._peers and not self._left:
                self._told.wait_for(lambda: self._failure is not None, within)
        return self._failure

    def fail(self, message: str, status: int) -> None:
        """Tell the others, in one line, that this rank ends with this exit status, and why."""
        if self._failure is None and not self._left:
            failed = {"rank": self.rank, "host": self.host, "message": message, "status": status}
            self._send_all({"failed": failed})

    def leave(self) -> None:
        """End together with the others, once every rank has come here; raises RankError."""
        self.barrier()
        self._left = True
        self._send_all({"left": True})

    def _send_all(self, message: Mapping[str, Any]) -> None:
        for rank in self._peers:
            self._send(rank, message)

    def _send(self, rank: int, message: Mapping[str, Any]) -> None:
        self._peers[rank].send(message)

    def _receive(self, rank: int) -> Any:
        values = self._values[rank]
        with self._told:
            self._told.wait_for(lambda: values or self._failure is not None)
            self.check()
            return values.popleft()

    def _listen(self, rank: int) -> None:
        """Take what one rank says until it leaves or its connection ends; a thread of its own."""
        with self._peers[rank] as peer:
            for message in peer.messages():
                if "left" in message:
                    return
                if "failed" in message:
                    self._failed(message["failed"])
                    return
                with self._told:
                    self._values[rank].append(message["value"])
                    self._told.notify_all()
            if self._left:
                return
            text = "ended without a word, as a process does that is killed"
            self._failed({"rank": rank, "host": peer.host, "message": text, "status": EXIT_LOST})

    def _failed(self, failed: Mapping[str, Any]) -> None:
        if self.rank == 0 and self._failure is None:
            # Before anybody here can notice: this process may end as soon as it does.
            self._send_all({"failed": failed})
        text = f"rank {failed['rank']} on {failed['host']}: {failed['message']}"
        with self._told:
            self._failure = self._failure or RankError(text, failed["status"])
            self._told.notify_all()


class _Peer:
    """A connection to another rank: one JSON value a line, both ways."""

    def __init__(self, connection: socket.socket) -> None:
        import socket

        self._connection = connection
        self._lines = connection.makefile("rb")
        self._lock = threading.Lock()
        self.host: str = connection.getpeername()[0]
        for option, value in (
            (socket.TCP_KEEPIDLE, _SILENCE // 2),
            (socket.TCP_KEEPINTVL, 1),
            (socket.TCP_KEEPCNT, _SILENCE // 2),
            (socket.TCP_USER_TIMEOUT, _SILENCE * 1000),
            (socket.TCP_NODELAY, 1),
        ):
            connection.setsockopt(socket.IPPROTO_TCP, option, value)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.settimeout(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._connection.close()

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one value; that nobody is there any more is noticed by who listens."""
        with self._lock, suppress(OSError):
            self._connection.sendall(json.dumps(message).encode() + b"\n")

    def messages(self) -> Iterator[dict[str, Any]]:
        """What comes, until the connection ends."""
        with suppress(OSError, ValueError):
            for line in self._lines:
                yield json.loads(line)


ALONE = Ranks()
"""The only rank of a run that torchrun did not start."""
_joined = ALONE


def joined() -> Ranks:
    """The ranks that this process has joined, ALONE before it has joined any."""
    return _joined


def join() -> Ranks:
    """This process among the ranks that torchrun started, all connected; ALONE without torchrun.

    Raises NetworkError if they do not find one another.
    """
    global _joined
    size = _stated("WORLD_SIZE", 1) if _RUN in os.environ else 1
    if size > 1 and _joined is ALONE:
        rank, local = _stated("RANK", 0, size - 1), _stated("LOCAL_RANK", 0, size - 1)
        _joined = _met(Ranks(rank, size, local, _stated("LOCAL_WORLD_SIZE", local + 1, size)))
    return _joined


def _stated(name: str, least: int, most: int = 1 << 20) -> int:
    """A number that torchrun puts into the environment; raises UsageError for any other text."""
    text = os.environ.get(name, "1" if name == "WORLD_SIZE" else "")
    if not re.fullmatch(r"\d{1,7}", text, re.ASCII) or not least <= int(text) <= most:
        raise UsageError(
            f"{_RUN} is set as torchrun does, but {name} is {text!r:.40}: start it with torchrun, "
            f"or unset {_RUN}"
        )
    return int(text)


def _met(ranks: Ranks) -> Ranks:
    """The same, connected with the others."""
    # A process that is alone needs neither sockets nor subprocesses.
    from gptoss_convert.machine.introduction import accepted, connected

    try:
        ranks.connect(accepted(ranks.size) if ranks.rank == 0 else {0: connected(ranks.rank)})
    except (OSError, ValueError) as error:
        raise NetworkError(f"rank {ranks.rank} of {ranks.size}: no connection: {error}") from None
    ranks.name_hosts(ranks.gather(ranks.host))
    threading.Thread(target=_insist, args=(ranks,), daemon=True).start()
    return ranks


def _insist(ranks: Ranks) -> None:
    """End a process that has not ended by itself when another rank has failed: it loses no more
    than by a kill. It may wait for a disk that does not answer, or plan for long."""
    if reason := ranks.failure(within=threading.TIMEOUT_MAX):
        time.sleep(_GRACE)
        print(f"error: {reason}", file=sys.stderr, flush=True)
        ranks.note(f"error: {reason}")
        os._exit(reason.exit_code)

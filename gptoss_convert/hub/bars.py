"""The client's progress bar, forwarded to our own progress; it can also end a download."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from gptoss_convert.errors import NetworkError

PIECE = 10_000_000
"""Bytes of a download that are told at once."""


class StoppedDownloadError(Exception):
    """Raised in the middle of a download that nobody waits for any more."""


def bar_type(advance: Callable[[int], None], stop: threading.Event) -> type[Any]:
    """A class that the client takes for tqdm; once `stop` is set, its downloads end."""
    from tqdm.std import tqdm

    class Bar(tqdm):
        """Shows nothing, passes bytes on."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(disable=True)
            self.untold = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            """Take bytes that have arrived."""
            if stop.is_set():
                raise StoppedDownloadError
            self.untold += int(n or 0)
            if self.untold >= PIECE:
                self.close()

        def close(self) -> None:
            """Tell what is left."""
            if self.untold:
                advance(self.untold)
                self.untold = 0

        def update_transfer(self, n: float | None = 1) -> None:
            """Compressed bytes, which are told once they are files."""

        def set_transfer_postfix_str(self, *args: Any, **kwargs: Any) -> None:
            """Their rate."""

    return Bar


def limited(bar: type[Any], most: int, where: str) -> type[Any]:
    """The same for one file: NetworkError once more has come than the file has bytes, however it
    came."""

    class Limited(bar):
        """Counts what is written."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.arrived = int(kwargs.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            """Take bytes that have arrived; fewer than none where a download begins anew."""
            self.arrived += int(n or 0)
            if self.arrived > most:
                raise NetworkError(f"{where}: the server sends more than the {most} bytes listed")
            super().update(n)

    return Limited

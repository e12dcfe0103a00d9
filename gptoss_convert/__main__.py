"""The command's entry: turns errors into one line and an exit status; a bug keeps its traceback."""

from __future__ import annotations

import itertools
import os
import resource
import shlex
import signal
import sys
from types import FrameType

import click

from gptoss_convert.cli.options import complain, say
from gptoss_convert.errors import GptossError, ResourceError
from gptoss_convert.show.documents import document

_STOPS = (signal.SIGINT, signal.SIGTERM)
_LATER = 0.02
"""Seconds after which a signal that came during an import is looked at again."""
_REPORT = "this is a bug in gptoss-convert: please report it with the traceback above"
_BUG = 70


class StoppedError(BaseException):
    """SIGINT or SIGTERM arrived: unwind after the step at work, so that it can be gone on with."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind once; a second signal leaves at once, as a kill would, which loses no more."""
    for again in _STOPS:
        signal.signal(again, lambda second, frame: os._exit(128 + second))
    _unwind(number, frame)


def _unwind(number: int, frame: FrameType | None) -> None:
    """Raise StoppedError, after the import that is at work: its callbacks swallow an exception
    and keep the import lock, for which everybody would wait forever."""
    if not _imports(frame):
        raise StoppedError(number)
    signal.signal(signal.SIGALRM, lambda alarm, frame: _unwind(number, frame))
    signal.setitimer(signal.ITIMER_REAL, _LATER)


def _imports(frame: FrameType | None) -> bool:
    """Whether a frame or a caller of it belongs to Python's import."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib."):
            return True
        frame = frame.f_back
    return False


def main() -> None:
    """Run the command line and leave with its exit status."""
    for number in _STOPS:
        signal.signal(number, _stop)
    _allow_open_files()
    sys.exit(_run())


def _allow_open_files() -> None:
    """As many open files as the system grants: each shard of SOURCE and TARGET takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run() -> int:
    from gptoss_convert.cli.main import cli

    try:
        result = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except SystemExit:
        # If whoever read the help has left, click puts another stdout in place: no error.
        if sys.stdout is not sys.__stdout__:
            return 0
        raise
    except click.ClickException as error:
        error.show()
        return _told(error.format_message(), error.exit_code)
    except (GptossError, OSError, MemoryError) as error:
        return _failed(error)
    except (StoppedError, KeyboardInterrupt, click.exceptions.Abort) as error:
        return _stopped(error.number if isinstance(error, StoppedError) else signal.SIGINT)
    except Exception as error:
        import traceback

        from gptoss_convert.machine.ranks import joined

        traceback.print_exc()
        print(_REPORT, file=sys.stderr)
        joined().fail("a bug in gptoss-convert", _BUG)
        return _told(f"{type(error).__name__}: {error}", _BUG)
    return result if isinstance(result, int) else 0


def _failed(error: GptossError | OSError | MemoryError) -> int:
    """Say in one line what went wrong; returns the exit status."""
    if isinstance(error, BrokenPipeError):
        # Whoever read the output has left: nothing more can be said on it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    if isinstance(error, MemoryError):
        error = ResourceError("out of memory; lower --workers or --max-memory")
    elif isinstance(error, OSError):
        from gptoss_convert.machine.files import disk_error

        error = disk_error(error.filename or "input or output", error)
    return _ended(error)


def _ended(error: GptossError) -> int:
    """Say why this rank ends, to its user and to the other ranks; returns the exit status."""
    from gptoss_convert.machine.ranks import joined

    for number in (*_STOPS, signal.SIGALRM):
        # torchrun terminates who is about to say why another one has ended.
        signal.signal(number, signal.SIG_IGN)
    _say(f"error: {error}")
    joined().fail(str(error), error.exit_code)
    return _told(str(error), error.exit_code)


def _stopped(number: int) -> int:
    """Say how to go on; returns the exit status that shells know.

    torchrun terminates the ranks of its machine when one has failed: that one's reason counts.
    """
    from gptoss_convert.machine.ranks import joined

    ranks = joined()
    how = "interrupted" if number == signal.SIGINT else "terminated"
    if reason := ranks.failure(within=1.0):
        return _ended(reason)
    ranks.fail(how, 128 + number)
    command = shlex.join(["gptoss-convert", *sys.argv[1:]])
    if ranks.size > 1:
        command = "torchrun with the same words, or with another number of ranks"
    message = f"{how}: nothing was published; the same command goes on: {command}"
    _say(message)
    return _told(message, 128 + number)


def _say(text: str) -> None:
    """A line to stderr, and to this rank's log."""
    from gptoss_convert.machine.ranks import joined

    complain(text)
    joined().note(text)


def _told(error: str, exit_code: int) -> int:
    """Say it in JSON too, if stdout is to carry JSON; returns the exit status."""
    from gptoss_convert.machine.ranks import joined

    if _prints_json(sys.argv[1:]) and joined().rank == 0:
        say(document("error", {"error": error, "exit_code": exit_code}))
    return exit_code


def _prints_json(words: list[str]) -> bool:
    """Whether stdout is to carry JSON: verify's --json may name a file instead."""
    words = list(itertools.takewhile(lambda word: word != "--", words))
    if "--json" not in words:
        return False
    after = words[words.index("--json") + 1 :][:1]
    return words[0] != "verify" or not after or after[0].startswith("-")


if __name__ == "__main__":
    main()

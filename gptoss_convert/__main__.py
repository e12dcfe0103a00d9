"""The command's entry: turns errors into one line and an exit status; a bug keeps its traceback."""

from __future__ import annotations

import errno
import os
import resource
import shlex
import signal
import sys
from types import FrameType

import click

from gptoss_convert.errors import DiskError, GptossError, ResourceError

_REPORT = "this is a bug in gptoss-convert: please report it with the traceback above"
_BUG = 70
_HINTS = {
    errno.ENOSPC: "; free some space and run the same command again",
    errno.EDQUOT: "; the quota is used up",
    errno.EMFILE: "; allow more open files: ulimit -n 4096",
}


class StoppedError(BaseException):
    """SIGINT or SIGTERM arrived: unwind after the step at work, so that it can be gone on with."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _stop(number: int, frame: FrameType | None) -> None:
    """Unwind once; a second signal leaves at once, as a kill would, which loses no more."""
    for again in (signal.SIGINT, signal.SIGTERM):
        signal.signal(again, lambda second, frame: os._exit(128 + second))
    raise StoppedError(number)


def main() -> None:
    """Run the command line and leave with its exit status."""
    signal.signal(signal.SIGINT, _stop)
    signal.signal(signal.SIGTERM, _stop)
    _allow_open_files()
    sys.exit(_run())


def _allow_open_files() -> None:
    """As many open files as the system grants: each shard of SOURCE and TARGET takes two."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run() -> int:
    from gptoss_convert.cli import cli
    from gptoss_convert.ranks import joined

    try:
        result = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (GptossError, OSError, MemoryError) as error:
        return _failed(error)
    except (StoppedError, KeyboardInterrupt, click.exceptions.Abort) as error:
        return _stopped(error.number if isinstance(error, StoppedError) else signal.SIGINT)
    except Exception:
        import traceback

        traceback.print_exc()
        print(_REPORT, file=sys.stderr)
        joined().fail("a bug in gptoss-convert", _BUG)
        return _BUG
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
        where = f"{error.filename}: " if error.filename else ""
        hint = _HINTS.get(error.errno or 0, "")
        error = DiskError(f"{where}{error.strerror or error}{hint}")
    return _ended(error)


def _ended(error: GptossError) -> int:
    """Say why this rank ends, to its user and to the other ranks; returns the exit status."""
    from gptoss_convert.ranks import joined

    print(f"error: {_printable(str(error))}", file=sys.stderr)
    joined().fail(str(error), error.exit_code)
    return error.exit_code


def _stopped(number: int) -> int:
    """Say how to go on; returns the exit status that shells know.

    torchrun terminates the ranks of its machine when one has failed: that one's reason counts.
    """
    from gptoss_convert.ranks import joined

    how = "interrupted" if number == signal.SIGINT else "terminated"
    if reason := joined().failure(within=1.0):
        return _ended(reason)
    joined().fail(how, 128 + number)
    command = shlex.join(["gptoss-convert", *sys.argv[1:]])
    print(f"{how}: nothing was published; the same command goes on: {command}", file=sys.stderr)
    return 128 + number


def _printable(text: str) -> str:
    """One line that no name from an untrusted file can break or colour."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


if __name__ == "__main__":
    main()

"""The command's entry: turns errors into one line and an exit status; a bug keeps its traceback.

Only what handling signals needs is imported at once. The rest is imported later, where a failure to
import ends with an exit status of its own.
"""

from __future__ import annotations

# The signals without the enumerations of their names, which take longer than all else here.
import _signal as signal  # pyright: ignore[reportMissingImports]
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

_STOPS = (signal.SIGINT, signal.SIGTERM)
_LATER = 0.002
"""Seconds after which a signal that came during an import is looked at again."""
_BUG = 70
_ROOM = 256 << 20
"""Bytes that a command needs to be able to begin: numpy with its library, and a first buffer."""


class StoppedError(BaseException):
    """SIGINT or SIGTERM arrived: unwind after the step at work, so that it can be gone on with."""

    def __init__(self, number: int) -> None:
        super().__init__("interrupted" if number == signal.SIGINT else "terminated")
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
    status = _BUG
    try:
        for number in _STOPS:
            signal.signal(number, _stop)
        from gptoss_convert.machine import standard_streams

        standard_streams.prepare()
        _allow_open_files()
        # Workers are threads of ours: a library's own would wait for the same processors.
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
        status = _run()
        _flush()
    except BaseException as error:
        status = _last_words(error)
    for number in (*_STOPS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    if sys.flags.inspect:
        # With PYTHONINSPECT, Python would ask for statements, and its end would decide.
        _flush()
        os._exit(status)
    sys.exit(status)


def _flush() -> None:
    """Leave nothing on stdout that Python could fail to write at exit."""
    from gptoss_convert.machine.standard_streams import discard_output

    try:
        sys.stdout.flush()
    except OSError:
        discard_output()


def _allow_open_files() -> None:
    """As many open files as the system grants: each shard of SOURCE and TARGET takes two."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _last_words(error: BaseException) -> int:
    """The exit status where nothing else can be done any more, such as an import without memory."""
    number = getattr(error, "number", signal.SIGINT if isinstance(error, KeyboardInterrupt) else 0)
    usual = 5 if isinstance(error, OSError) else _BUG
    usual = 7 if isinstance(error, MemoryError | ImportError) else usual
    status = 128 + number if number else getattr(error, "exit_code", usual)
    try:
        said = str(error) or ("interrupted" if number else "out of memory")
        text = " ".join(f"error: {said}".split())
        os.write(2, f"{text}\n".encode(errors="backslashreplace"))
    except Exception:
        return status
    return status


def _run() -> int:
    """Run the command line; returns its exit status, whatever happens."""
    try:
        return _command()
    except (StoppedError, KeyboardInterrupt) as error:
        from gptoss_convert.cli import ending

        return ending.stopped(error.number if isinstance(error, StoppedError) else signal.SIGINT)
    except BaseException as error:
        from gptoss_convert.cli import ending
        from gptoss_convert.machine.failures import meaning

        known = meaning(error)
        return ending.bug(error, _BUG) if known is None else ending.failed(known)


def _command() -> int:
    """Run the command line; raises what its commands raise."""
    from gptoss_convert.machine import standard_streams
    from gptoss_convert.machine.resources import require_room

    require_room(_ROOM)
    import click

    from gptoss_convert.cli import ending
    from gptoss_convert.cli.main import cli

    try:
        result = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output has left: nothing more can be said on it, not even at exit.
        standard_streams.discard_output()
        return 0
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except SystemExit as leave:
        # If whoever read the help has left, click puts another stdout in place: no error.
        wrong = sys.stdout is sys.__stdout__ and leave.code not in (None, 0)
        return 2 if wrong else 0
    except click.ClickException as error:
        error.show()
        return ending.told(error.format_message(), error.exit_code)
    except click.exceptions.Abort:
        raise KeyboardInterrupt from None
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()

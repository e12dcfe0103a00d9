"""The command's entry: turns errors into one line and an exit status; a bug keeps its traceback."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import NoReturn

import click

from gptoss_convert.errors import GptossError

_REPORT = "this is a bug in gptoss-convert: please report it with the traceback above"


class TerminatedError(BaseException):
    """SIGTERM arrived: unwind, so that nothing half-written stays behind."""


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise TerminatedError


def main() -> None:
    """Run the command line and leave with its exit status."""
    signal.signal(signal.SIGTERM, _terminate)
    sys.exit(_run())


def _run() -> int:
    from gptoss_convert.cli import cli

    try:
        result = cli.main(standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.Exit as leave:
        return leave.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except GptossError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, click.exceptions.Abort):
        print("interrupted: nothing was published", file=sys.stderr)
        return 130
    except TerminatedError:
        print("terminated: nothing was published", file=sys.stderr)
        return 143
    except BrokenPipeError:
        # Whoever read the output has left: nothing more can be said on it, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception:
        import traceback

        traceback.print_exc()
        print(_REPORT, file=sys.stderr)
        return 70
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()

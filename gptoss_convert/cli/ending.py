"""How a command ends when it fails: what it tells people, programs and other ranks."""

from __future__ import annotations

import itertools
import shlex
import signal
import sys
import traceback

from gptoss_convert.cli.output import complain, say
from gptoss_convert.errors import DiskError, GptossError
from gptoss_convert.machine.ranks import joined
from gptoss_convert.machine.standard_streams import discard_output
from gptoss_convert.show.documents import document

_WRITERS = ("convert", "synth")
"""The commands that go on where they were; the others begin again."""
_there: list[str] = []
_REPORT = "this is a bug in gptoss-convert: please report it with the traceback above"


def failed(error: GptossError) -> int:
    """Say why this rank ends, to its user and to the other ranks; returns the exit status."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        # torchrun terminates who is about to say why another one has ended.
        signal.signal(number, signal.SIG_IGN)
    _say(f"error: {error}")
    joined().fail(str(error), error.exit_code)
    return told(str(error), error.exit_code)


def stopped(number: int) -> int:
    """Say how to go on; returns the exit status that shells know.

    torchrun terminates the ranks of its machine when one has failed: that one's reason counts.
    """
    ranks = joined()
    how = "interrupted" if number == signal.SIGINT else "terminated"
    if reason := ranks.failure(within=1.0):
        return failed(reason)
    ranks.fail(how, 128 + number)
    command = shlex.join(["gptoss-convert", *sys.argv[1:]])
    if ranks.size > 1:
        command = "torchrun with the same words, or with another number of ranks"
    goes_on = f"nothing was published; the same command goes on: {command}"
    if not any(word in sys.argv[1:2] for word in _WRITERS):
        goes_on = f"run it again: {command}"
    message = f"{how}: {_there[-1] if _there else goes_on}"
    _say(message)
    return told(message, 128 + number)


def is_there(text: str) -> None:
    """Say this, instead, should the command be stopped from now on: its TARGET is published."""
    _there.append(text)


def _say(text: str) -> None:
    """A line to stderr, and to this rank's log."""
    complain(text)
    joined().note(text)


def told(error: str, exit_code: int) -> int:
    """Say it in JSON too, if stdout is to carry JSON; returns the exit status."""
    if _prints_json(sys.argv[1:]) and joined().rank == 0:
        try:
            say(document("error", {"error": error, "exit_code": exit_code}))
        except DiskError:
            # The reason why the command ends decides the status, not where else it may be said.
            discard_output()
    return exit_code


def _prints_json(words: list[str]) -> bool:
    """Whether stdout is to carry JSON: verify's --json may name a file instead."""
    words = list(itertools.takewhile(lambda word: word != "--", words))
    if "--json" not in words:
        return False
    after = words[words.index("--json") + 1 :][:1]
    return words[0] != "verify" or not after or after[0].startswith("-")


def bug(error: BaseException, status: int) -> int:
    """Show where it happened; returns the status."""
    traceback.print_exception(error)
    print(_REPORT, file=sys.stderr)
    joined().fail("a bug in gptoss-convert", status)
    return told(f"{type(error).__name__}: {error}", status)

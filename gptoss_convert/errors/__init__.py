"""Every error this package raises on purpose, and the exit status each one ends a command with."""

from __future__ import annotations

from gptoss_convert.errors.secrets import scrub


class GptossError(Exception):
    """Base of all expected errors; the message is one line: where, what, expected, found.

    No message holds a secret, wherever it is caught: what it repeats of others is scrubbed here.
    """

    exit_code: int = 3

    def __init__(self, message: str = "") -> None:
        super().__init__(scrub(message))


class UsageError(GptossError):
    """The command or call is wrong or ambiguous: the message lists the valid choices."""

    exit_code = 2


class InputError(GptossError):
    """The input is malformed, unsupported, or not a GPT-OSS checkpoint."""

    exit_code = 3


class CodecError(InputError):
    """A value cannot be expressed in the encoding asked for."""


class IntegrityError(GptossError):
    """The input is damaged: truncated, missing parts, or files that contradict each other."""

    exit_code = 4


class DiskError(GptossError):
    """Reading or writing failed, or the disk is full."""

    exit_code = 5


class NetworkError(GptossError):
    """A download failed or was refused."""

    exit_code = 6


class ResourceError(GptossError):
    """Memory is insufficient for the plan."""

    exit_code = 7


class TargetError(GptossError):
    """TARGET exists, or somebody else is writing it."""

    exit_code = 8


EXIT_LOST = NetworkError.exit_code
"""The status of a run one of whose ranks ended without a word."""


class RankError(GptossError):
    """Another rank of this run failed; the message is that rank's, and so is the exit status."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


EXIT_CODES: dict[int, str] = {
    0: "done, or both sides are the same",
    1: "a check ran and the answer is 'different'",
    2: "wrong usage",
    3: "bad or unsupported input",
    4: "integrity: truncated, missing, non-finite, contradictory",
    5: "disk or I/O",
    6: "network or authentication",
    7: "memory insufficient, or no further thread can be started",
    8: "TARGET exists or is busy",
    130: "interrupted (SIGINT)",
    143: "terminated (SIGTERM)",
}

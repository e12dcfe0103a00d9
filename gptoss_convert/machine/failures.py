"""What an exception of Python, of a library or of the system means to whoever ran the command."""

from __future__ import annotations

import errno

from gptoss_convert.errors import GptossError, InputError, ResourceError, UsageError
from gptoss_convert.errors.refusals import disk_error

_NO_ROOM = ("cannot allocate memory", "failed to map segment", "bad_alloc", "can't allocate memory")
"""Of libraries that tell of missing memory by an error of another kind; in small letters."""
UNSUPPORTED = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP}
"""What a file system answers to a request that it does not know, for O_DIRECT say."""


def meaning(error: BaseException) -> GptossError | None:
    """The error in one line and with its exit status; None for what can only be a bug."""
    if isinstance(error, GptossError):
        return error
    if isinstance(error, MemoryError) or _is_lack_of_memory(error):
        return ResourceError("out of memory; lower --workers or --max-memory, or raise ulimit -v")
    if isinstance(error, OSError):
        if error.errno == errno.EAGAIN:
            return _no_threads()
        return disk_error(error.filename or "input or output", error)
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return _no_threads()
    if is_panic(error):
        text = " ".join(str(error).split()) or "no reason given"
        return InputError(f"a library gave up on what it was given to read: {text:.300}")
    return None


def is_panic(error: BaseException) -> bool:
    """Whether a library in Rust has given up: what it raises then is no Exception."""
    return type(error).__name__ == "PanicException"


def absent(needed: str, error: ImportError) -> GptossError:
    """What to raise where a library that is `needed` cannot be imported: memory may be missing."""
    return meaning(error) or UsageError(f"{needed}: {error}")


def _no_threads() -> ResourceError:
    return ResourceError(
        "the system starts no further thread or process; allow more (ulimit -u, ulimit -v, or the "
        "container's limits)"
    )


def _is_lack_of_memory(error: BaseException) -> bool:
    """Whether the error, or one that it came from, tells of missing memory."""
    seen: BaseException | None = error
    for _ in range(10):
        if seen is None:
            return False
        if isinstance(seen, MemoryError) or getattr(seen, "errno", None) == errno.ENOMEM:
            return True
        kinds = (ImportError, OSError, RuntimeError)
        if isinstance(seen, kinds) and any(one in str(seen).lower() for one in _NO_ROOM):
            return True
        seen = seen.__cause__ or seen.__context__
    return False

"""What the system refuses to do with a file."""

from __future__ import annotations

import errno

from gptoss_convert.errors import DiskError


def disk_error(where: object, error: OSError) -> DiskError:
    """What the system refused, and what to do about it."""
    hint = {
        errno.ENOSPC: "; free some space and run the same command again",
        errno.EDQUOT: "; the quota is used up",
        errno.EFBIG: "; the file system or a limit allows no file of this size",
        errno.EMFILE: "; allow more open files (ulimit -n 4096), or raise --max-shard-size",
    }.get(error.errno or 0, "")
    return DiskError(f"{where}: {error.strerror or error}{hint}")

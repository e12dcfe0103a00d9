"""The gate for a running server: are its answers those of the model in the files?"""

from __future__ import annotations

import os
import time
from pathlib import Path

from gptoss_convert.errors import UsageError
from gptoss_convert.hub.sources import locate, opening, with_weights
from gptoss_convert.machine.progress import SILENT, Progress
from gptoss_convert.verify.gate import need_torch, side
from gptoss_convert.verify.result import Level, ServedOptions, Verification

LIMITS = "served"


def verify_served(
    source: str | Path,
    url: str,
    options: ServedOptions | None = None,
    progress: Progress = SILENT,
) -> Verification:
    """Compare what a server answers with what the forward pass computes from SOURCE.

    A difference is no error but the result. Raises what opening SOURCE raises; NetworkError where
    the server cannot be reached or refuses; InputError where it gives no log probabilities of the
    tokens asked for; UsageError, ResourceError as `verify_checkpoints` does.
    """
    options = options or ServedOptions()
    need_torch("--served")
    from gptoss_convert.verify.served_level import served_level
    from gptoss_convert.witness.served.connection import Connection

    connection = Connection(url, _key(options.api_key_env), options.timeout)
    began = time.monotonic()
    with opening(locate(source, options.revision), options.source) as ours:
        ours = with_weights(ours, options.source, progress)
        ours.extents()
        seconds = time.monotonic() - began
        header = Level("header", True, seconds, "SOURCE complete and consistent")
        target, level = served_level(ours, connection, options, progress)
        return Verification(side(ours), target, LIMITS, (header, level))


def _key(variable: str | None) -> str | None:
    """The API key, which is read here alone and stands in no message."""
    if variable is None:
        return None
    if not (key := os.environ.get(variable, "").strip()):
        raise UsageError("--api-key-env: no environment variable of that name holds a key")
    return key

"""The gate: are two checkpoints the same model? Four levels, each includes those before it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from gptoss_convert.containers.paths import require_unchanged
from gptoss_convert.containers.seen import remembering
from gptoss_convert.formats.checkpoint import Checkpoint
from gptoss_convert.formats.option import require_words
from gptoss_convert.hub.adapters import with_adapter
from gptoss_convert.hub.sources import locate, opening, with_weights
from gptoss_convert.machine.failures import absent
from gptoss_convert.machine.progress import SILENT, Progress
from gptoss_convert.machine.ranks import ALONE, Ranks
from gptoss_convert.verify.result import LEVELS, Level, Verification, VerifyOptions

LevelOf = Callable[[Checkpoint, Checkpoint, VerifyOptions, Progress, Ranks], Level]
_ON_TORCH = ("logits", "oracle")


def verify_checkpoints(
    source: str | Path,
    target: str | Path,
    options: VerifyOptions | None = None,
    progress: Progress = SILENT,
    ranks: Ranks = ALONE,
) -> Verification:
    """Compare two checkpoints of any formats: directories, or repositories on the Hub.

    All of `ranks` have the same result.

    Raises what opening them raises, UsageError where a level lacks its libraries, ResourceError
    where memory is too small, RankError if another rank failed; a difference is no error but the
    result.
    """
    options = options or VerifyOptions()
    require_words(options, "level")
    with (
        # The tables' readers and those of witnesses each open the files: all see the same ones.
        remembering() as seen,
        opening(locate(source, options.revision), options.source) as ours,
        opening(locate(target), options.target) as theirs,
    ):
        if options.level != "header":
            ours = with_weights(ours, options.source, progress)
            theirs = with_weights(theirs, options.target, progress)
        ours = with_adapter(ours, options, progress, options.source.follow_links)
        levels: list[Level] = []
        for name in LEVELS[: LEVELS.index(options.level) + 1]:
            # Of models of different sizes there is nothing to hold side by side.
            if levels and not levels[0].same:
                break
            levels.append(_level(name)(ours, theirs, options, progress, ranks))
        require_unchanged(seen.values())
        return Verification(side(ours), side(theirs), options.limits, tuple(levels))


def side(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a report says of a checkpoint."""
    return {
        "path": checkpoint.place,
        "format": checkpoint.label,
        "model": checkpoint.config.size,
        "bytes": sum(chunk.nbytes for chunk in checkpoint.chunks),
        "notes": list(checkpoint.notes),
        "adapter": checkpoint.adapter.record() if checkpoint.adapter else None,
    }


def _level(name: str) -> LevelOf:
    """The function that answers at a level: `<name>_level` of the module of that name."""
    if name in _ON_TORCH:
        need_torch("--level logits")
    return getattr(import_module(f"{__package__}.{name}_level"), f"{name}_level")


def need_torch(wanted: str) -> None:
    """Raise UsageError unless torch, which is wanted for something, can be imported."""
    try:
        import torch  # noqa: F401
    except ImportError as error:
        needed = "needs torch (pip install 'gptoss-convert[verify]')"
        raise absent(f"{wanted} {needed}; --level values needs nothing more", error) from None

"""Which iteration directory of a Megatron checkpoint to read, and whether it is `torch_dist`."""

from __future__ import annotations

import re
from pathlib import Path

from gptoss_convert.containers.paths import folder_inside, lies, read_text
from gptoss_convert.containers.seen import forgetting
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.errors import InputError, IntegrityError, UsageError

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
"""The directory of a checkpoint without an iteration, as converters to Megatron name it."""
_ITERATION = re.compile(r"iter_(\d{7,})")
_MAX_TEXT = 1 << 16


def find_iteration(root: Path, iteration: int | None, legacy: bool = False) -> Path:
    """Return the directory of the asked or the latest iteration, found to be `torch_dist`.

    It may be of the `legacy` format where the caller reads that. `root` may be the iteration
    directory itself. Raises UsageError if the choice is open, InputError for the formats that are
    not read, IntegrityError for an unfinished save.
    """
    if lies(root, ".metadata") or lies(root, "metadata.json") or _is_legacy(root):
        if iteration is not None and root.name != f"iter_{iteration:07d}":
            raise UsageError(f"{root}: is itself an iteration directory; omit --iteration")
        directory = root
    elif iteration is not None:
        directory = folder_inside(root, f"iter_{iteration:07d}")
        if directory is None:
            raise UsageError(f"{root}: no iteration {iteration}; {_choices(root)}")
    else:
        directory = _latest(root)
    if not (legacy and _is_legacy(directory)):
        _require_torch_dist(directory)
    return directory


def _latest(root: Path) -> Path:
    tracker = root / TRACKER
    if lies(root, TRACKER):
        # Training goes on, and names another iteration by and by.
        with forgetting():
            text = read_text(root, TRACKER, _MAX_TEXT).strip()
        name = text if text == RELEASE else f"iter_{int(text):07d}" if _is_number(text) else None
        if name is None:
            raise InputError(f"{tracker}: expected an iteration, found {text[:40]!a}")
        if directory := folder_inside(root, name):
            return directory
        raise UsageError(f"{tracker}: names {name}, which is missing; {_choices(root)}")
    present = [f"iter_{number:07d}" for number in _present(root)]
    present += [RELEASE] * (root / RELEASE).is_dir()
    if len(present) == 1 and (directory := folder_inside(root, present[0])):
        return directory
    if not present:
        raise InputError(f"{root}: not a Megatron checkpoint: no {TRACKER}, no iter_* directory")
    raise UsageError(f"{root}: no {TRACKER}; {_choices(root)}")


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 16


def _present(root: Path) -> list[int]:
    if not root.is_dir():
        return []
    found = (_ITERATION.fullmatch(entry.name) for entry in root.iterdir() if entry.is_dir())
    return sorted(int(match[1]) for match in found if match)


def _choices(root: Path) -> str:
    present = _present(root)
    if (root / RELEASE).is_dir():
        numbers = f"choose --iteration {' or '.join(map(str, present))}, or " if present else ""
        return f"{numbers}pass {root / RELEASE}"
    if not present:
        return "no iteration is present"
    return f"choose --iteration {' or '.join(map(str, present))}"


def _is_legacy(directory: Path) -> bool:
    return directory.is_dir() and any(directory.glob("mp_rank_*"))


def _require_torch_dist(directory: Path) -> None:
    if _is_legacy(directory):
        raise InputError(f"{directory}: legacy 'torch' format (mp_rank_*); supported: torch_dist")
    config = directory / "metadata.json"
    if lies(directory, config.name):
        text = read_text(directory, config.name, _MAX_TEXT)
        backend = parse_object(str(config), text).get("sharded_backend")
        if not isinstance(backend, str):
            raise InputError(f"{config}: names no sharded_backend")
        if backend != "torch_dist":
            raise InputError(f"{config}: format {backend!a:.80}; supported: torch_dist")
    if any(directory.glob("*/.zarray")):
        raise InputError(f"{directory}: zarr format; supported: torch_dist")
    if not lies(directory, ".metadata"):
        if any(directory.glob("*.distcp")) or config.is_file():
            raise IntegrityError(
                f"{directory}: no .metadata: an unfinished (perhaps asynchronous) save"
            )
        raise InputError(f"{directory}: not a torch_dist checkpoint: no .metadata")

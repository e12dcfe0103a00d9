"""Megatron's torch_dist as a format: recognised by its tracker, written as one iteration.

What reads and writes it is loaded where that is done: whether SOURCE is Megatron's is asked always.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from functools import partial
from pathlib import Path

from gptoss_convert.containers import Image
from gptoss_convert.containers.iterations import RELEASE
from gptoss_convert.containers.paths import folder_inside
from gptoss_convert.errors import UsageError
from gptoss_convert.formats import dcp
from gptoss_convert.formats.checkpoint import Checkpoint, Choices, Format
from gptoss_convert.formats.config import Config
from gptoss_convert.formats.image_options import ImageOptions
from gptoss_convert.formats.megatron.files import HF_FOLDER, NEMO_WEIGHTS, TRACKER, is_legacy
from gptoss_convert.layouts.table_files import load_table

_MARKERS = frozenset((TRACKER, ".metadata", "metadata.json"))


def _recognise(path: Path) -> Path | None:
    # verl's and SkyRL's trackers have the name of Megatron's.
    if dcp.is_nested(path) or any(path.glob("global_step_*")):
        return None
    of_nemo = folder_inside(path, NEMO_WEIGHTS)
    if of_nemo is not None and (of_nemo / "metadata.json").exists():
        return of_nemo
    marked = any((path / name).exists() for name in _MARKERS) or any(path.glob("iter_*"))
    marked = marked or is_legacy(path)
    return path if marked or (path / RELEASE / ".metadata").exists() else None


def _listed(names: Set[str]) -> Set[str]:
    marked = names & _MARKERS or any(name.startswith("iter_") for name in names)
    if marked:
        raise UsageError("torch_dist is read from a directory only")
    return frozenset()


def _variant(encoding: str, options: ImageOptions) -> str:
    if options.dtype == "mxfp4":
        raise UsageError("--to megatron --dtype mxfp4: Megatron's layout has BF16 experts only")
    return options.layout + ("-both" if options.also_local_spec else "")


def _open(root: Path, choices: Choices) -> Checkpoint:
    from gptoss_convert.formats.megatron.opening import open_megatron

    return open_megatron(FORMAT, root, choices)


def _image(source: Checkpoint, variant: str, options: ImageOptions) -> tuple[Image, list[str]]:
    from gptoss_convert.formats.megatron.writing import image

    return image(FORMAT.table, source, variant, options)


def _launch_words(config: Config, target: str) -> Sequence[str]:
    from gptoss_convert.formats.megatron.launch import launch_words

    return launch_words(config, target)


def _launch_page(config: Config) -> str:
    from gptoss_convert.formats.megatron.launch import launch_page

    return launch_page(config)


FORMAT = Format(
    "megatron",
    partial(load_table, "megatron"),
    _recognise,
    _open,
    _listed,
    _variant,
    _image,
    side=f"{HF_FOLDER}/",
    own=("iteration", "glu_interleave", "from_main_params"),
    launch_words=_launch_words,
    launch_page=_launch_page,
)

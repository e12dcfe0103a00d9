"""What TARGET gets beside converted tensors: the tokenizer and its like, the scales' sidecar."""

from __future__ import annotations

from pathlib import Path

from gptoss_convert.containers import Image
from gptoss_convert.containers.refs import Copied, FileRef
from gptoss_convert.errors import InputError, UsageError
from gptoss_convert.formats import sidecar
from gptoss_convert.formats.checkpoint import CONFIG, MANIFEST, Checkpoint
from gptoss_convert.formats.options import ImageOptions
from gptoss_convert.layouts.model import load_model

_NOT_CARRIED = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json", ".incomplete")
_MOST = 256 << 20
"""Most bytes of such files, each and all together."""
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


def carried_files(root: Path) -> tuple[Path, ...]:
    """The files beside the weights that a served directory needs and no conversion changes."""
    return tuple(
        path
        for path in sorted(root.iterdir() if root.is_dir() else ())
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_NOT_CARRIED)
        and path.name not in {CONFIG, MANIFEST, "dtypes.json"}
        and path.stat().st_size <= _MOST
    )


def copies(source: Checkpoint, options: ImageOptions) -> tuple[list[tuple[str, Copied]], list[str]]:
    """The carried files of SOURCE or of --tokenizer, and a note if the tokenizer is missing."""
    folder = options.tokenizer
    if folder is not None and not folder.is_dir():
        raise UsageError(f"--tokenizer {folder}: no such directory")
    paths = carried_files(folder) if folder is not None else source.carried
    found = [
        (path.name, Copied(FileRef(path.parent, path.name), path.stat().st_size)) for path in paths
    ]
    if (nbytes := sum(copied.size for _, copied in found)) > _MOST:
        raise InputError(
            f"{paths[0].parent}: {nbytes} bytes of files beside the weights, at most {_MOST} "
            "are carried; move away what the model does not need"
        )
    lacking = [name for name in _TOKENIZER if name not in {path.name for path in paths}]
    note = f"no {' and no '.join(lacking)}: SOURCE has none; pass --tokenizer DIR to add them"
    return found, [note] * bool(lacking)


def sidecar_image(source: Checkpoint, variant: str, options: ImageOptions) -> Image:
    """The sidecar, wherever BF16 is written and the scales of its MXFP4 source are known."""
    known = source.encoding == "mxfp4" or source.scales is not None
    if variant == "mxfp4" or not known or not options.keep_scales:
        return Image((), (), ())
    sizes = load_model().sizes(source.config.numbers)
    return sidecar.image(sizes, source.origin())

"""Reading a torch_dist directory: every chunk located, no pickle executed, torch not imported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path

from gptoss_convert.containers import Chunk
from gptoss_convert.containers.disguise import LOOKED_AT, disguise
from gptoss_convert.containers.paths import lies
from gptoss_convert.containers.refs import Identity
from gptoss_convert.containers.torch_dist import common, metadata
from gptoss_convert.containers.torch_dist.coverage import require_tiling
from gptoss_convert.containers.torch_dist.files import open_file
from gptoss_convert.containers.torch_dist.items import ItemLocator, within
from gptoss_convert.containers.torch_dist.metadata import Item, Metadata, StoredTensor
from gptoss_convert.containers.torch_dist.pickle_state import MAX_BYTES
from gptoss_convert.containers.torch_dist.stand_ins import DTYPE_NAMES
from gptoss_convert.errors import InputError, IntegrityError

_SHOWN = 8
_PICKLE = b"\x80"
"""How a pickle begins, of any protocol that torch has ever written."""
COMMON_STATE = "common_state/shard_0_1"
"""Object that holds the common state from core 0.19 on; before, it is the file `common.pt`."""


@dataclass(frozen=True, slots=True)
class TorchDist:
    """A torch_dist directory: every chunk lies inside its file and each tensor is covered once."""

    chunks: tuple[Chunk, ...]
    objects: tuple[str, ...]
    """Names of all serialized objects, the skipped ones included."""
    common: Mapping[str, object]
    skipped: Mapping[str, int]
    """Entries that hold no weights, by kind: optimizer, rng, extra_state, other."""
    saved_by: str
    notes: tuple[str, ...] = ()
    """What is odd about the directory and harms nothing."""


def read(iteration_dir: Path, kind: Callable[[str], str] | None = None) -> TorchDist:
    """Return what a directory holds; of the tensors' data nothing is read.

    `kind` tells what an entry of a name holds; `weight` and `common` are read, all others counted.
    It is Megatron's `kind_of` unless said otherwise.
    Raises InputError for foreign globals in a pickle, unsafe paths and unsupported dtypes,
    IntegrityError for missing files, truncation, and chunks that overlap or leave gaps.
    """
    kind = kind or kind_of
    content = _content(iteration_dir)
    _parsed.cache_clear()
    weights = [tensor for tensor in content.tensors if kind(tensor.name) == "weight"]
    kinds = [kind(tensor.name) for tensor in content.tensors]
    kinds += ["other" if (k := kind(name)) == "weight" else k for name in content.objects]
    skipped = Counter(one for one in kinds if one not in ("weight", "common"))
    _require_files(iteration_dir, content)
    _require_disjoint(content, iteration_dir)
    for tensor in weights:
        _require_weight(iteration_dir, tensor)
    chunks = tuple(_chunks(weights, _locate(iteration_dir, weights)))
    state = _common(iteration_dir, content)
    saver = _saved_by(iteration_dir, state)
    notes = tuple(_remarks(iteration_dir, content))
    return TorchDist(chunks, tuple(content.objects), state, dict(skipped), saver, notes)


def tensor_names(directory: Path) -> tuple[str, ...]:
    """Return the names of all tensors of a directory; raises as `read` does."""
    return tuple(tensor.name for tensor in _content(directory).tensors)


def read_object(directory: Path, name: str) -> dict[str, object]:
    """Return the attributes of a serialized object as plain data; raises as `read` does."""
    item = _content(directory).objects[name]
    where = f"{directory / item.file}: {name}"
    with open_file(directory, item.file) as opened:
        return common.parse_namespace(within(opened.read_at, item, where), item.length, where)


def kind_of(name: str) -> str:
    """Return what an entry holds by Megatron's names: weight, optimizer, rng, extra_state, ..."""
    parts = name.replace("/", ".").split(".")
    if parts[0] == "common_state":
        return "common"
    if "_extra_state" in parts:
        return "extra_state"
    if parts[0].startswith("chained_"):
        parts = parts[1:]
    if parts[:1] in (["optimizer"], ["opt_param_scheduler"]):
        return "optimizer"
    return "rng" if parts[:1] in (["rng_state"], ["rerun_state_machine_state"]) else "weight"


def _content(directory: Path) -> Metadata:
    path = directory / ".metadata"
    state = path.stat() if path.is_file() else None
    return _parsed(directory, state and (state.st_size, state.st_mtime_ns, state.st_ino))


@lru_cache(maxsize=1)
def _parsed(directory: Path, state: object) -> Metadata:
    """The content of `.metadata`: whoever recognises a directory asks first, then whoever reads."""
    return metadata.parse(_metadata_bytes(directory), str(directory / ".metadata"))


def _metadata_bytes(directory: Path) -> bytes:
    if not lies(directory, ".metadata"):
        raise IntegrityError(
            f"{directory}: no .metadata: not torch_dist, or an unfinished (asynchronous) save"
        )
    with open_file(directory, ".metadata") as opened:
        if opened.size > MAX_BYTES:
            raise InputError(f"{directory}: .metadata of {opened.size} bytes")
        content = opened.read_at(0, opened.size)
    if found := disguise(content[:LOOKED_AT], len(content), "torch_dist"):
        raise IntegrityError(f"{directory / '.metadata'}: {found}")
    if not content.startswith(_PICKLE):
        raise IntegrityError(f"{directory / '.metadata'}: no pickle: damaged, or another file")
    return content


def _remarks(directory: Path, content: Metadata) -> Iterator[str]:
    """Files that an earlier save of more ranks left, say."""
    named = {item.file for item, _ in _all_items(content)}
    if spare := sorted({path.name for path in directory.glob("*.distcp")} - named):
        more = f" and {len(spare) - _SHOWN} more" if len(spare) > _SHOWN else ""
        shown = ", ".join(spare[:_SHOWN])
        yield f"{directory / '.metadata'}: does not name {shown}{more}: not read"


def _require_files(directory: Path, content: Metadata) -> None:
    files = {item.file for item, _ in _all_items(content)}
    missing = sorted(name for name in files if not (directory / name).is_file())
    if missing:
        raise IntegrityError(f"{directory}: {len(missing)} files missing: {', '.join(missing)}")


def _all_items(content: Metadata) -> Iterator[tuple[Item, str]]:
    for tensor in content.tensors:
        for item in tensor.items.values():
            yield item, tensor.name
    for name, item in content.objects.items():
        yield item, name


def _require_disjoint(content: Metadata, directory: Path) -> None:
    """Require that items lie inside their files and share no byte."""
    file, size, reached, previous = "", 0, 0, ""
    for item, name in sorted(_all_items(content), key=lambda pair: (pair[0].file, pair[0].offset)):
        if item.file != file:
            file, size, reached = item.file, (directory / item.file).stat().st_size, 0
        if item.offset < reached:
            where = directory / file
            raise IntegrityError(f"{where}: items of {previous} and {name} overlap")
        reached, previous = item.offset + item.length, name
        if reached > size:
            with open_file(directory, file) as opened:
                found = disguise(opened.read_at(0, min(size, LOOKED_AT)), size, "torch_dist")
            cut = f"truncated: {name} ends at byte {reached}, the file at {size}"
            raise IntegrityError(f"{directory / file}: {found or cut}")


def _require_weight(directory: Path, tensor: StoredTensor) -> None:
    where = f"{directory}: {tensor.name}"
    if tensor.dtype not in DTYPE_NAMES:
        raise InputError(f"{where}: dtype {tensor.dtype}; supported: {', '.join(DTYPE_NAMES)}")
    try:
        require_tiling(tensor.shape, tensor.items.keys())
    except (InputError, IntegrityError) as error:
        raise type(error)(f"{where}: {error}") from None


def _locate(directory: Path, tensors: Iterable[StoredTensor]) -> dict[Item, tuple[int, Identity]]:
    """Return the offset of each item's data and the identity of its file, in file order."""
    parts = [(item, box, tensor) for tensor in tensors for box, item in tensor.items.items()]
    parts.sort(key=lambda part: (part[0].file, part[0].offset))
    locator = ItemLocator()
    offsets: dict[Item, tuple[int, Identity]] = {}
    for file, group in groupby(parts, key=lambda part: part[0].file):
        path = str(directory / file)
        with open_file(directory, file) as opened:
            for item, box, tensor in group:
                where = f"{path}: {tensor.name} at {box.start}"
                at = locator.locate(opened.read_at, item, tensor.dtype, box.extent, where)
                offsets[item] = at, opened.identity
    return offsets


def _chunks(
    tensors: Iterable[StoredTensor], offsets: Mapping[Item, tuple[int, Identity]]
) -> Iterator[Chunk]:
    for tensor in tensors:
        dtype = DTYPE_NAMES[tensor.dtype]
        for box, item in tensor.items.items():
            yield Chunk(
                tensor.name, dtype, tensor.shape, box.start, box.extent, item.file, *offsets[item]
            )


def _common(directory: Path, content: Metadata) -> dict[str, object]:
    """Return the common state: of the file if present, as Megatron's loaders prefer it."""
    if lies(directory, "common.pt"):
        with open_file(directory, "common.pt") as opened:
            return common.parse(opened.read_at, opened.size, str(directory / "common.pt"))
    item = content.objects.get(COMMON_STATE)
    if item is None:
        return {}
    where = f"{directory / item.file}: {COMMON_STATE}"
    with open_file(directory, item.file) as opened:
        return common.parse(within(opened.read_at, item, where), item.length, where)


def _saved_by(directory: Path, state: Mapping[str, object]) -> str:
    if lies(directory, "run_config.yaml"):
        return "Megatron-Bridge"
    if "args" in state:
        return "Megatron-LM"
    return "megatron-core" if lies(directory, "metadata.json") else "torch"

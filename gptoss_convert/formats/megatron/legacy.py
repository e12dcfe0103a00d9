"""Megatron's legacy `torch` format: a pickled state dict for each tensor, pipeline and expert rank.

Its names are those of the modules, numbered from zero on every rank. Here each rank's part is put
where it belongs in the model, under names that `mappings/megatron.toml` has (`module-*`).
Sources: Megatron-LM's training/checkpointing.py (folders), megatron-core's `sharded_state_dict`
(which axis each rank cuts), its pipeline's layer offsets. No pickle is executed.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from gptoss_convert.containers import Chunk, torch_saves
from gptoss_convert.containers.torch_dist import TorchDist
from gptoss_convert.containers.torch_dist.common import plain
from gptoss_convert.containers.torch_saves import SavedFile
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.formats.megatron.files import LEGACY

_FOLDER = re.compile(r"mp_rank_(\d{2,6})(?:_(\d{3,6}))?(?:_(\d{3,6}))?")
_MODEL = re.compile(r"model(\d{1,4})?")
_LAYER = re.compile(r"decoder\.layers\.(\d{1,6})\.(.+)")
_EXPERT = re.compile(
    r"(mlp\.experts\.)(?:linear_fc([12])\.(weight|bias)(\d{1,6})"
    r"|local_experts\.(\d{1,6})\.linear_fc([12])\.(weight|bias))"
)
_CUT = {
    "embedding.word_embeddings.weight": 0,
    "output_layer.weight": 0,
    "self_attention.linear_qkv.weight": 0,
    "self_attention.linear_qkv.bias": 0,
    "self_attention.core_attention.softmax_offset": 0,
    "self_attention.linear_proj.weight": 1,
}
"""The axis along which tensor-parallel ranks cut a tensor; any other is the same on all of them."""
_PLAIN = (None, False, 0)
_UNEVEN = (
    *("decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"),
    *("account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"),
    *("pipeline_model_parallel_layout", "pipeline_model_parallel_split_rank"),
)
"""Arguments that give pipeline stages different numbers of layers."""
_SKIPPED = {
    "optimizer": "optimizer",
    "opt_param_scheduler": "optimizer",
    "rng_state": "rng",
    "rerun_state_machine": "rng",
}
"""What lies beside the model, by kind; all else is the common state."""


@dataclass(frozen=True, slots=True)
class _Parallel:
    """How many ranks of each kind there are, as `args` say."""

    tensor: int
    pipeline: int
    virtual: int
    expert: int
    expert_tensor: int
    layers: int
    experts: int

    def layer(self, pipeline: int, virtual: int, local: int) -> int:
        """A layer's number in the model."""
        each = self.layers // (self.pipeline * self.virtual)
        return virtual * (self.layers // self.virtual) + pipeline * each + local


@dataclass(frozen=True, slots=True)
class _Rank:
    """One folder: which rank of each kind wrote it."""

    folder: str
    tensor: int
    pipeline: int
    expert: int


def read(directory: Path) -> TorchDist:
    """What an iteration's directory holds, as if it were torch_dist.

    Raises InputError for layouts that are not read, IntegrityError where ranks are missing or
    contradict each other.
    """
    folders = sorted(path.name for path in directory.glob("mp_rank_*") if path.is_dir())
    state = _common(torch_saves.open_saved(directory, f"{folders[0]}/{LEGACY}"))
    parallel = _parallel(directory, state)
    ranks = [_rank(directory, folder, parallel) for folder in folders]
    _require_all(directory, ranks, parallel)
    parts: dict[str, list[Chunk]] = defaultdict(list)
    skipped: Counter[str] = Counter()
    count = 0
    files = torch_saves.open_all(directory, (f"{rank.folder}/{LEGACY}" for rank in ranks))
    for rank, file in zip(ranks, files, strict=True):
        for virtual, name, value in _entries(file, parallel, skipped):
            for chunk in _placed(file, parallel, rank, virtual, name, value):
                parts[chunk.tensor].append(chunk)
                torch_saves.require_few(str(directory), count := count + 1)
    chunks = [
        chunk
        for name, held in parts.items()
        for chunk in torch_saves.tiled(f"{directory}: {name}", held)
    ]
    return TorchDist(tuple(chunks), (), state, dict(skipped), "Megatron-LM (legacy torch format)")


def _common(file: SavedFile) -> dict[str, object]:
    """The values beside model and optimizer; raises InputError for versions of other layouts."""
    if not isinstance(file.value, dict):
        raise InputError(f"{file.where}: holds no dict")
    beside = {
        key: value
        for key, value in file.value.items()
        if key not in _SKIPPED and not (isinstance(key, str) and _MODEL.fullmatch(key))
    }
    state = plain(beside, file.where)
    version = state.get("checkpoint_version", 0)
    if not isinstance(version, int | float) or version < 2:
        raise InputError(
            f"{file.where}: checkpoint_version {version!r:.40}: before 2, rows of q, k and v lie "
            "in another order; not read"
        )
    return state


def _parallel(directory: Path, state: Mapping[str, object]) -> _Parallel:
    args = state.get("args")
    if not isinstance(args, dict):
        raise InputError(f"{directory}: no args, which say how ranks shared the model")
    for name in _UNEVEN:
        if args.get(name) not in _PLAIN:
            raise InputError(f"{directory}: args: {name} is {args[name]!r:.80}: not read")

    def number(name: str, default: int) -> int:
        value = args.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 1 << 20:
            raise InputError(f"{directory}: args: {name} is {value!r:.80}")
        return value

    tensor = number("tensor_model_parallel_size", 1)
    found = _Parallel(
        tensor,
        number("pipeline_model_parallel_size", 1),
        number("virtual_pipeline_model_parallel_size", 1),
        number("expert_model_parallel_size", 1),
        number("expert_tensor_parallel_size", tensor),
        number("num_layers", 0),
        number("num_experts", 0),
    )
    if found.expert_tensor not in {1, tensor}:
        raise InputError(
            f"{directory}: experts cut for {found.expert_tensor} ranks, all else for {tensor}: "
            "read where both are equal or experts are whole"
        )
    for count, ranks, what in (
        (found.layers, found.pipeline * found.virtual, "layers on pipeline stages"),
        (found.experts, found.expert, "experts on expert ranks"),
    ):
        if count % ranks:
            raise InputError(f"{directory}: {count} {what}, of which there are {ranks}")
    return found


def _rank(directory: Path, folder: str, parallel: _Parallel) -> _Rank:
    """Which rank a folder is of: a number is left out where there is one rank of its kind."""
    match = _FOLDER.fullmatch(folder)
    numbers = [int(number) for number in match.groups() if number] if match else []
    sizes = [parallel.tensor]
    sizes += [size for size in (parallel.pipeline, parallel.expert) if size > 1]
    if len(numbers) != len(sizes) or any(n >= m for n, m in zip(numbers, sizes, strict=False)):
        raise IntegrityError(
            f"{directory / folder}: args say {parallel.tensor} tensor, {parallel.pipeline} "
            f"pipeline and {parallel.expert} expert ranks"
        )
    tensor, *rest = numbers
    pipeline = rest.pop(0) if parallel.pipeline > 1 else 0
    return _Rank(folder, tensor, pipeline, rest.pop(0) if parallel.expert > 1 else 0)


def _require_all(directory: Path, ranks: list[_Rank], parallel: _Parallel) -> None:
    """Demand every tensor and every expert rank of each pipeline stage."""
    for stage in range(parallel.pipeline):
        own = [rank for rank in ranks if rank.pipeline == stage]
        for kind, size, found in (
            ("tensor", parallel.tensor, {rank.tensor for rank in own}),
            ("expert", parallel.expert, {rank.expert for rank in own}),
        ):
            if lost := sorted({*range(size)} - found):
                raise IntegrityError(
                    f"{directory}: no folder of {kind}-parallel rank {lost[0]} in stage {stage}: "
                    "missing, or never saved (Megatron-LM before 2026-05-13 left out tensor ranks "
                    "where there were more of them than of experts)"
                )


def _entries(
    file: SavedFile, parallel: _Parallel, skipped: Counter[str]
) -> Iterator[tuple[int, str, object]]:
    """Each tensor of the model with its virtual stage; counts what else there is."""
    assert isinstance(file.value, dict)
    stages = 0
    for key, value in file.value.items():
        match = _MODEL.fullmatch(key) if isinstance(key, str) else None
        if key in _SKIPPED:
            skipped[_SKIPPED[key]] += 1
        if match is None:
            continue
        stages += 1
        for name, one in torch_saves.named_values(value, f"{file.where}: {key}"):
            if name.endswith("._extra_state") or "_extra_state" in name.split("."):
                skipped["extra_state"] += 1
            else:
                yield int(match[1] or 0), name, one
    if stages != parallel.virtual:
        raise IntegrityError(
            f"{file.where}: {stages} models (model0, ..), args say {parallel.virtual} virtual "
            "stages"
        )


def _placed(
    file: SavedFile, parallel: _Parallel, rank: _Rank, virtual: int, name: str, value: object
) -> Iterator[Chunk]:
    """A rank's tensor where it belongs in the model's."""
    where = f"{file.where}: {name}"
    found = [*torch_saves.pieces(value, where)]
    if len(found) != 1 or found[0].extent != found[0].shape:
        raise InputError(f"{where}: part of a tensor, where whole ones are expected")
    (piece,) = found
    layer = _LAYER.fullmatch(name)
    inner = layer[2] if layer else name
    expert = _EXPERT.fullmatch(inner)
    if expert is not None:
        inner = _numbered(expert, rank.expert * (parallel.experts // parallel.expert))
    whole = (
        f"decoder.layers.{parallel.layer(rank.pipeline, virtual, int(layer[1]))}." if layer else ""
    )
    chunk = file.chunk(f"{whole}{inner}", piece)
    if expert is not None:
        ranks = parallel.expert_tensor
        yield from _of_expert(chunk, expert, ranks, rank.tensor if ranks > 1 else 0)
        return
    axis = _CUT.get(inner)
    yield chunk if axis is None else _part(chunk, axis, parallel.tensor, rank.tensor)


def _numbered(expert: re.Match[str], first: int) -> str:
    """An expert's name with its number in the model."""
    stem, fc, kind, grouped, alone, fc_alone, kind_alone = expert.groups()
    if grouped is not None:
        return f"{stem}linear_fc{fc}.{kind}{first + int(grouped)}"
    return f"{stem}local_experts.{first + int(alone)}.linear_fc{fc_alone}.{kind_alone}"


def _of_expert(chunk: Chunk, expert: re.Match[str], ranks: int, rank: int) -> Iterator[Chunk]:
    """An expert's tensor: of fc1 each rank holds some rows of gate, then the same of up."""
    weight = (expert[3] or expert[7]) == "weight"
    if (expert[2] or expert[6]) == "2":
        yield _part(chunk, 1, ranks, rank) if weight else chunk
        return
    rows = chunk.extent[0] // 2
    if ranks == 1 or chunk.extent[0] % 2:
        yield chunk
        return
    nbytes = chunk.nbytes // 2
    for half in range(2):
        yield replace(
            chunk,
            shape=(2 * rows * ranks, *chunk.shape[1:]),
            start=((half * ranks + rank) * rows, *chunk.start[1:]),
            extent=(rows, *chunk.extent[1:]),
            offset=chunk.offset + half * nbytes,
        )


def _part(chunk: Chunk, axis: int, ranks: int, rank: int) -> Chunk:
    """A rank's equal part of a tensor along an axis."""
    if axis >= len(chunk.shape):
        return chunk
    length = chunk.extent[axis]
    shape, start = [*chunk.shape], [*chunk.start]
    shape[axis], start[axis] = length * ranks, length * rank
    return replace(chunk, shape=tuple(shape), start=tuple(start))

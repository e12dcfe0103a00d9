"""torch_dist: what our writer plans, PyTorch loads; what PyTorch saves, our reader locates."""

from __future__ import annotations

import argparse
import enum
import io
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from gptoss_convert.containers import Image, TensorSpec
from gptoss_convert.containers.torch_dist import (
    common,
    extra_state_objects,
    find_iteration,
    image,
    read,
)
from gptoss_convert.errors import InputError, IntegrityError, UsageError
from tests.tiny_files import known
from tests.torch_dist_files import box_of, bytes_of, read_tensors, write_image, write_small

SPECS = [
    TensorSpec("experts", "BF16", (4, 6, 10), (1, 3, 10)),
    TensorSpec("ragged", "F32", (7,), (3,)),
    TensorSpec("whole", "F16", (2, 5)),
    TensorSpec("page", "BF16", (2, 4096), (1, 4096)),
    TensorSpec("codes", "U8", (3, 3), (3, 1)),
]


def load_with_dcp(path: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    state = {name: torch.zeros_like(tensor) for name, tensor in like.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        load(state, storage_reader=FileSystemReader(path), no_dist=True)
    return state


def save_with_dcp(path: Path, state: dict[str, object]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        save(state, storage_writer=FileSystemWriter(path, thread_count=2), no_dist=True)


def test_dcp_loads_what_the_image_describes(tmp_path: Path) -> None:
    tensors = write_small(tmp_path / "it", SPECS, files=3)
    loaded = load_with_dcp(tmp_path / "it", tensors)
    for name, tensor in tensors.items():
        assert bytes_of(loaded[name]) == bytes_of(tensor), name


def test_each_item_is_a_safe_torch_save_file(tmp_path: Path) -> None:
    tensors = write_small(tmp_path / "it", SPECS)
    with (tmp_path / "it" / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    for index, place in metadata.storage_data.items():
        raw = (tmp_path / "it" / place.relative_path).read_bytes()
        item = raw[place.offset : place.offset + place.length]
        loaded = torch.load(io.BytesIO(item), weights_only=True)
        if index.offset is None:
            assert loaded[0].dtype == torch.uint8 and loaded[0].numel() == 0
            continue
        box = tuple(slice(s, s + n) for s, n in zip(index.offset, loaded.shape, strict=True))
        assert bytes_of(loaded) == bytes_of(tensors[index.fqn][box])


def test_only_the_checksum_of_the_data_is_left_out(tmp_path: Path) -> None:
    write_small(tmp_path / "it", [TensorSpec("a", "F32", (5,))])
    with (tmp_path / "it" / ".metadata").open("rb") as stream:
        place = next(iter(pickle.load(stream).storage_data.values()))
    raw = (tmp_path / "it" / place.relative_path).read_bytes()
    with zipfile.ZipFile(io.BytesIO(raw[place.offset : place.offset + place.length])) as archive:
        assert archive.testzip() == "archive/data/0"


def test_data_begins_on_a_page(tmp_path: Path) -> None:
    write_small(tmp_path / "it", SPECS)
    chunks = read(tmp_path / "it").chunks
    assert {chunk.offset % 4096 for chunk in chunks} == {0}
    assert len({(chunk.file, chunk.offset) for chunk in chunks}) == len(chunks)


def plan(files: int = 2, max_file_bytes: int = 1 << 20) -> Image:
    objects = extra_state_objects(["norm._extra_state/shard_0_1"])
    return image(SPECS, objects, {"iteration": 1}, files=files, max_file_bytes=max_file_bytes)


def test_the_reader_finds_the_chunks_that_the_image_planned(tmp_path: Path) -> None:
    planned = plan()
    tensors = write_small(tmp_path / "it", SPECS, files=2)
    found = read(tmp_path / "it")
    assert found.chunks == planned.chunks
    assert found.objects == ("norm._extra_state/shard_0_1",)
    assert found.common == {"iteration": 1}
    assert found.skipped == {"extra_state": 1}
    assert all(torch.equal(read_tensors(tmp_path / "it")[n], t) for n, t in tensors.items())


def test_the_same_input_gives_the_same_bytes() -> None:
    # Equal but distinct strings must not change what the pickle shares.
    renamed = [TensorSpec("".join(list(s.name)), s.dtype, s.shape, s.chunk_shape) for s in SPECS]
    objects = extra_state_objects(["".join(list("norm._extra_state/shard_0_1"))])
    again = image(renamed, objects, {"iteration": 1}, files=2, max_file_bytes=1 << 20)
    assert again == plan()


def test_the_directory_is_declared_complete_last() -> None:
    assert [name for name, _ in plan().closing] == ["common.pt", ".metadata", "metadata.json"]


def test_items_share_their_fixed_bytes() -> None:
    fixed = [content for file in plan().files for _, content in file.fixed]
    assert len({id(content) for content in fixed}) == len(set(fixed))


def test_metadata_holds_each_name_once() -> None:
    """A 120b checkpoint has 37 thousand items: names repeated for each would double the file."""
    metadata = known(plan())[".metadata"]
    assert [metadata.count(name) for name in (b"__0_0.distcp", b"experts")] == [1, 1]


def test_files_respect_their_limit() -> None:
    files = plan(files=1, max_file_bytes=20_000).files
    assert len(files) > 2
    assert all(file.size <= 20_000 for file in files)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (TensorSpec("a", "F32", (600, 600)), "a: a chunk of 1440000 bytes exceeds the limit"),
        (TensorSpec("a", "F32", (4, 4), (2,)), "a: chunk shape"),
        (TensorSpec("a", "F32", (4, 4), (2, 0)), "a: chunk shape"),
        (TensorSpec("a", "F32", (40_000, 40_000)), "takes 6400000000 bytes"),
    ],
)
def test_a_chunk_that_fits_no_file_is_refused(spec: TensorSpec, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        image([spec], {}, {}, files=1, max_file_bytes=1 << 20)


def test_the_reader_locates_what_dcp_saved(tmp_path: Path) -> None:
    tensors: dict[str, object] = {
        "a": torch.randn(3, 4, dtype=torch.bfloat16),
        "b": torch.randn(3, 4, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "view": torch.randn(8, 5)[2:4],
        "counts": {"nested": 1},
    }
    save_with_dcp(tmp_path / "it", tensors)
    found = read(tmp_path / "it")
    assert sorted(chunk.tensor for chunk in found.chunks) == ["a", "b", "scalar", "view"]
    for chunk in found.chunks:
        tensor = tensors[chunk.tensor]
        assert isinstance(tensor, Tensor)
        with (tmp_path / "it" / chunk.file).open("rb") as stream:
            stream.seek(chunk.offset)
            assert stream.read(chunk.nbytes) == bytes_of(tensor[box_of(chunk)])
    assert found.skipped == {"other": 1}


def test_reading_imports_no_torch(tmp_path: Path) -> None:
    write_small(tmp_path / "it", SPECS)
    code = (
        "import sys, pathlib; from gptoss_convert.containers.torch_dist import read\n"
        "read(pathlib.Path(sys.argv[1])); sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "it")], check=True)


def test_training_arguments_become_plain_data(tmp_path: Path) -> None:
    write_small(tmp_path / "it", SPECS)
    state = {
        "args": argparse.Namespace(num_layers=4, dtype=torch.bfloat16, load=Path("/a/b")),
        "order": OrderedDict(x=(1, 2.5, None)),
        "state": torch.zeros(3),
        "iteration": 7,
    }
    torch.save(state, tmp_path / "it" / "common.pt")
    found = read(tmp_path / "it")
    args = {"num_layers": 4, "dtype": "torch.bfloat16", "load": "/a/b"}
    assert found.common == {
        "args": args,
        "order": {"x": (1, 2.5, None)},
        "state": "tensor torch.float32 of 3 elements",
        "iteration": 7,
    }
    assert found.saved_by == "Megatron-LM"


def test_the_common_state_may_be_an_object(tmp_path: Path) -> None:
    """As core 0.19 and later store it: a list of one dict inside a .distcp file."""
    stream = io.BytesIO()
    torch.save([{"iteration": 3}], stream)
    objects = {"common_state/shard_0_1": stream.getvalue()}
    planned = image(SPECS[1:2], objects, {}, files=1, max_file_bytes=1 << 20)
    tensors = {"ragged": torch.randn(7)}
    path = write_image(planned, tensors, tmp_path / "it")
    (path / "common.pt").unlink()
    assert read(path).common == {"iteration": 3}


def test_optimizer_and_random_states_are_counted_and_skipped(tmp_path: Path) -> None:
    names = (
        "optimizer.state.exp_avg.embedding.weight",
        "chained_0.optimizer.state.exp_avg.embedding.weight",
        "rng_state",
    )
    specs = [TensorSpec(name, "F32", (3,)) for name in names]
    write_small(tmp_path / "it", [*SPECS, *specs])
    found = read(tmp_path / "it")
    assert found.skipped == {"optimizer": 2, "rng": 1, "extra_state": 1}
    assert {chunk.tensor for chunk in found.chunks} == {spec.name for spec in SPECS}


def make_iterations(root: Path, *iterations: int, tracker: str | None = None) -> None:
    for iteration in iterations:
        write_small(root / f"iter_{iteration:07d}", SPECS[:1])
    if tracker is not None:
        root.mkdir(exist_ok=True)
        (root / "latest_checkpointed_iteration.txt").write_text(tracker)


def test_the_tracker_chooses_the_iteration(tmp_path: Path) -> None:
    make_iterations(tmp_path, 1, 20, tracker="1\n")
    assert find_iteration(tmp_path, None) == tmp_path / "iter_0000001"
    assert find_iteration(tmp_path, 20) == tmp_path / "iter_0000020"
    assert find_iteration(tmp_path / "iter_0000020", None) == tmp_path / "iter_0000020"


def test_one_iteration_needs_no_tracker(tmp_path: Path) -> None:
    make_iterations(tmp_path, 5)
    assert find_iteration(tmp_path, None) == tmp_path / "iter_0000005"


@pytest.mark.parametrize(
    ("iterations", "tracker", "asked", "message"),
    [
        ((1, 2), "3", None, "names iter_0000003, which is missing; choose --iteration 1 or 2"),
        ((1, 2), None, None, "choose --iteration 1 or 2"),
        ((1,), "1", 4, "no iteration 4; choose --iteration 1"),
    ],
)
def test_an_open_choice_of_iteration_is_a_usage_error(
    tmp_path: Path,
    iterations: tuple[int, ...],
    tracker: str | None,
    asked: int | None,
    message: str,
) -> None:
    make_iterations(tmp_path, *iterations, tracker=tracker)
    with pytest.raises(UsageError, match=message):
        find_iteration(tmp_path, asked)


def test_other_formats_are_named(tmp_path: Path) -> None:
    for folder, file, content in (
        ("legacy", "mp_rank_00/model_optim_rng.pt", b""),
        ("zarr", "metadata.json", b'{"sharded_backend": "zarr", "sharded_backend_version": 1}'),
        ("junk", "iter_0000001/x", b""),
        ("tracked", "latest_checkpointed_iteration.txt", b"../../etc"),
    ):
        path = tmp_path / folder / file
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"legacy 'torch' format"):
        find_iteration(tmp_path / "legacy", None)
    with pytest.raises(InputError, match=r"format 'zarr'; supported: torch_dist"):
        find_iteration(tmp_path / "zarr", None)
    with pytest.raises(InputError, match=r"not a torch_dist checkpoint"):
        find_iteration(tmp_path / "junk", None)
    with pytest.raises(InputError, match=r"expected an iteration, found '\.\./\.\./etc'"):
        find_iteration(tmp_path / "tracked", None)


def test_an_unfinished_save_is_an_integrity_error(tmp_path: Path) -> None:
    make_iterations(tmp_path, 1, tracker="1")
    (tmp_path / "iter_0000001" / ".metadata").unlink()
    with pytest.raises(IntegrityError, match="unfinished"):
        find_iteration(tmp_path, None)


class Scope(enum.Enum):
    LAYER = "layer"


class Arguments(argparse.Namespace):
    """What a trainer calls its namespace."""


def test_objects_of_a_trainers_own_classes_leave_the_rest_readable(tmp_path: Path) -> None:
    write_small(tmp_path / "it", SPECS)
    args = Arguments(num_layers=4, scope=Scope.LAYER, window=np.int64(7), kind=Scope)
    torch.save({"args": args, "hook": Scope.LAYER, "iteration": 7}, tmp_path / "it" / "common.pt")
    found = read(tmp_path / "it").common
    assert found["iteration"] == 7
    plain = found["args"]
    assert isinstance(plain, dict)
    assert plain.pop("num_layers") == 4
    assert all(isinstance(value, common.Opaque) for value in plain.values())
    assert plain["scope"] == plain["kind"] == f"{__name__}.Scope"

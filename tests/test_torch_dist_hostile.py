"""Damaged and hostile torch_dist directories: one line, the right error, nothing executed."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from gptoss_convert.containers import TensorSpec
from gptoss_convert.containers.torch_dist import read
from gptoss_convert.containers.torch_dist.coverage import require_tiling
from gptoss_convert.containers.torch_dist.files import open_file
from gptoss_convert.containers.torch_dist.metadata import ChunkBox
from gptoss_convert.errors import GptossError, InputError, IntegrityError
from tests.torch_dist_files import write_small

SPECS = [
    TensorSpec("layers.experts", "BF16", (4, 6, 10), (1, 3, 10)),
    TensorSpec("norm", "F32", (7,)),
]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    write_small(tmp_path / "it", SPECS, files=2)
    return tmp_path / "it"


def refused(path: Path, kind: type[GptossError], message: str) -> None:
    """`read` refuses; a message that begins with `^` begins so behind the directory."""
    if message.startswith("^"):
        message = f"^{re.escape(str(path))}(/|: )" + message[1:]
    with pytest.raises(kind, match=message) as caught:
        read(path)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def change(path: Path, edit: Callable[[Metadata], None]) -> None:
    with (path / ".metadata").open("rb") as stream:
        metadata = pickle.load(stream)
    edit(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def place(metadata: Metadata, tensor: str, start: tuple[int, ...]) -> _StorageInfo:
    return metadata.storage_data[MetadataIndex(tensor, torch.Size(start))]


def replace(path: Path, tensor: str, start: tuple[int, ...], **fields: object) -> None:
    def edit(metadata: Metadata) -> None:
        index = MetadataIndex(tensor, torch.Size(start))
        changed = dataclasses.replace(metadata.storage_data[index], **fields)
        metadata.storage_data[index] = changed

    change(path, edit)


class Touch:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return os.mkdir, (str(self.canary),)


def test_a_call_in_metadata_is_not_executed(path: Path, tmp_path: Path) -> None:
    change(path, lambda m: setattr(m, "planner_data", Touch(tmp_path / "canary")))
    refused(path, InputError, r"^\.metadata: pickle refers to posix\.mkdir; not executed$")
    assert not (tmp_path / "canary").exists()


def test_a_call_in_common_pt_is_not_executed(path: Path, tmp_path: Path) -> None:
    torch.save({"args": Touch(tmp_path / "canary")}, path / "common.pt")
    assert read(path).common == {"args": "posix.mkdir"}
    assert not (tmp_path / "canary").exists()


def rewrite_item(path: Path, name: str, value: object) -> None:
    """Put another serialized value where a tensor's first item is, at the end of its file."""
    stream = io.BytesIO()
    torch.save(value, stream)
    append_item(path, name, stream.getvalue())


def append_item(path: Path, name: str, content: bytes) -> None:
    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata[name]
        assert isinstance(entry, TensorStorageMetadata)
        index = MetadataIndex(name, entry.chunks[0].offsets)
        file = path / metadata.storage_data[index].relative_path
        offset = file.stat().st_size
        with file.open("ab") as stream:
            stream.write(content)
        metadata.storage_data[index] = _StorageInfo(file.name, offset, len(content))

    change(path, edit)


def test_a_call_in_a_tensor_item_is_not_executed(path: Path, tmp_path: Path) -> None:
    rewrite_item(path, "norm", Touch(tmp_path / "canary"))
    refused(path, InputError, r"norm at \(0,\): pickle refers to posix\.mkdir; not executed$")
    assert not (tmp_path / "canary").exists()


def test_an_object_is_never_unpickled(path: Path, tmp_path: Path) -> None:
    """`_extra_state` may hold any pickle: its bytes are not looked at."""
    with (path / ".metadata").open("rb") as stream:
        info = pickle.load(stream).storage_data[MetadataIndex("norm._extra_state/shard_0_1")]
    hostile = pickle.dumps(Touch(tmp_path / "canary")).ljust(info.length, b"\0")
    with (path / info.relative_path).open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(hostile)
    assert len(read(path).chunks) == 9
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "escape",
    ["../x", "/etc/passwd", "a/../../x", "c:x", "..\\x", "a\0b", "", ".", "a//b", "x" * 600],
)
def test_a_storage_path_that_leaves_the_directory_is_refused(path: Path, escape: str) -> None:
    replace(path, "norm", (0,), relative_path=escape)
    refused(path, InputError, r"^\.metadata: norm: storage path .* leaves the checkpoint")


def test_a_link_out_of_the_directory_is_refused(path: Path, tmp_path: Path) -> None:
    (path / "__0_0.distcp").rename(tmp_path / "elsewhere")
    (path / "__0_0.distcp").symlink_to(tmp_path / "elsewhere")
    refused(path, InputError, "outside the checkpoint")


def test_every_missing_file_is_listed(path: Path) -> None:
    for file in path.glob("*.distcp"):
        file.unlink()
    refused(path, IntegrityError, r"3 files missing: __0_0\.distcp, __0_1\.distcp, __0_2\.distcp$")


def test_a_truncated_file_names_the_tensor(path: Path) -> None:
    file = path / "__0_1.distcp"
    with file.open("r+b") as stream:
        stream.truncate(file.stat().st_size - 1)
    refused(path, IntegrityError, r"^__0_1\.distcp: truncated: norm ends at byte")


def edit_chunk(path: Path, number: int, **fields: tuple[int, ...]) -> None:
    """Change one chunk of the experts, and the key of its item with it."""

    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["layers.experts"]
        assert isinstance(entry, TensorStorageMetadata)
        old = entry.chunks[number]
        sizes = {name: torch.Size(value) for name, value in fields.items()}
        entry.chunks[number] = new = dataclasses.replace(old, **sizes)
        info = metadata.storage_data.pop(MetadataIndex("layers.experts", old.offsets))
        metadata.storage_data[MetadataIndex("layers.experts", new.offsets)] = info

    change(path, edit)


def test_chunks_that_do_not_tile_their_tensor_are_refused(path: Path) -> None:
    edit_chunk(path, 3, offsets=(1, 4, 0))
    refused(path, IntegrityError, r"^layers\.experts: chunk \[1:2, 4:7, 0:10\] is .* outside")
    edit_chunk(path, 3, offsets=(1, 2, 0))
    refused(path, IntegrityError, r"^layers\.experts: chunks .* and .* overlap")
    edit_chunk(path, 3, offsets=(1, 3, 0), sizes=(1, 2, 10))
    refused(path, IntegrityError, r"^layers\.experts: no chunk covers index 5 of axis 1 \(size 6\)")
    edit_chunk(path, 3, offsets=(1, 3, 0), sizes=(1, 3, 0))
    refused(path, IntegrityError, r"^layers\.experts: no chunk covers index 3 of axis 1 \(size 6\)")


def drop(path: Path, *, declared: bool) -> None:
    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["layers.experts"]
        assert isinstance(entry, TensorStorageMetadata)
        start = entry.chunks[5].offsets
        if declared:
            del entry.chunks[5]
        else:
            del metadata.storage_data[MetadataIndex("layers.experts", start)]

    change(path, edit)


def test_declared_and_stored_chunks_must_be_the_same(path: Path) -> None:
    drop(path, declared=False)
    refused(
        path, IntegrityError, r"layers\.experts: item at \(2, 3, 0\) is declared but not stored"
    )
    drop(path, declared=True)
    refused(path, IntegrityError, "no chunk covers index 3 of axis 1")


def test_a_stored_chunk_must_be_declared(path: Path) -> None:
    drop(path, declared=True)
    refused(
        path, IntegrityError, r"layers\.experts: item at \(2, 3, 0\) is stored but not declared"
    )


def test_items_must_not_overlap(path: Path) -> None:
    def edit(metadata: Metadata) -> None:
        first = place(metadata, "layers.experts", (0, 0, 0))
        index = MetadataIndex("layers.experts", torch.Size((0, 3, 0)))
        metadata.storage_data[index] = dataclasses.replace(first)

    change(path, edit)
    refused(path, IntegrityError, r"items of layers\.experts and layers\.experts overlap")


def test_a_transformed_item_is_refused(path: Path) -> None:
    replace(path, "norm", (0,), transform_descriptors=("zstd",))
    refused(path, InputError, "norm: stored through a transform")


def test_an_unsupported_dtype_is_named(path: Path) -> None:
    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["norm"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.properties.dtype = torch.float8_e4m3fn

    change(path, edit)
    refused(path, InputError, r"^norm: dtype torch\.float8_e4m3fn; supported: torch\.bfloat16")


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (torch.zeros(7, dtype=torch.float16), IntegrityError, "the item holds torch.float16"),
        (torch.zeros(8), IntegrityError, r"declared torch.float32 \(7,\), the item holds .*\(8,\)"),
        (torch.zeros(14)[::2], InputError, r"strides \(2,\) of shape \(7,\)"),
        ([torch.zeros(7)], InputError, "not one plain tensor"),
        ({"a": 1}, InputError, "not one plain tensor"),
        (torch.nn.Parameter(torch.zeros(7)), InputError, "_rebuild_parameter; not executed"),
    ],
    ids=["dtype", "shape", "strides", "list", "dict", "parameter"],
)
def test_an_item_that_is_not_the_declared_tensor_is_refused(
    path: Path, value: object, kind: type[GptossError], message: str
) -> None:
    rewrite_item(path, "norm", value)
    refused(path, kind, message)


def test_a_view_stored_with_its_whole_storage_is_located(path: Path) -> None:
    whole = torch.arange(20.0)
    rewrite_item(path, "norm", whole[5:12])
    (chunk,) = (chunk for chunk in read(path).chunks if chunk.tensor == "norm")
    with (path / chunk.file).open("rb") as stream:
        stream.seek(chunk.offset)
        assert stream.read(28) == whole[5:12].numpy().tobytes()


def test_one_odd_item_among_equal_ones_is_noticed(path: Path) -> None:
    """Items of one kind share a check: an item of the same length but another shape must not."""
    with (path / ".metadata").open("rb") as stream:
        info = place(pickle.load(stream), "layers.experts", (2, 0, 0))
    file = path / info.relative_path
    raw = bytearray(file.read_bytes())
    item = raw[info.offset : info.offset + info.length]
    extent = b"K\x01K\x03K\x0a\x87"
    assert item.count(extent) == 1
    item = item.replace(extent, b"K\x03K\x01K\x0a\x87")
    raw[info.offset : info.offset + info.length] = item
    file.write_bytes(raw)
    refused(path, IntegrityError, r"\(2, 0, 0\): declared .*\(1, 3, 10\), the item .*\(3, 1, 10\)")


def archive_of(names: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in names.items():
            archive.writestr(name, content)
    return stream.getvalue()


def genuine_item(value: object = None) -> bytearray:
    stream = io.BytesIO()
    torch.save(torch.arange(7.0) if value is None else value, stream)
    return bytearray(stream.getvalue())


def patched(old: bytes, new: bytes, count: int = -1) -> bytes:
    item = genuine_item()
    assert old in item
    return bytes(item.replace(old, new, count))


ZIPS: dict[str, tuple[bytes, type[GptossError], str]] = {
    "no zip": (b"x" * 500, IntegrityError, "no zip end record"),
    "short": (b"PK", IntegrityError, "no zip end record"),
    "end only": (archive_of({}), InputError, "not a torch.save archive"),
    "truncated": (bytes(genuine_item()[:-30]), IntegrityError, "no zip end record"),
    "head cut": (bytes(genuine_item()[64:]), IntegrityError, "zip"),
    "compressed": (
        archive_of({"a/data.pkl": b"\0" * 1000}, zipfile.ZIP_DEFLATED),
        InputError,
        "a/data.pkl is compressed",
    ),
    "escape": (archive_of({"a/../../data.pkl": b""}), InputError, "leaves its archive"),
    "absolute": (archive_of({"/a/data.pkl": b""}), InputError, "leaves its archive"),
    "drive": (archive_of({"c:/data.pkl": b""}), InputError, "leaves its archive"),
    "two folders": (archive_of({"a/x": b"", "b/y": b""}), InputError, "records in 2 folders"),
    "no pickle": (archive_of({"a/x": b""}), InputError, "no data.pkl"),
    "other local name": (
        patched(b"archive/data.pkl", b"archive/dota.pkl", 1),
        IntegrityError,
        "two names",
    ),
    "big endian": (patched(b"little", b"biggie"), InputError, "byte order b'biggie'"),
    "trailing": (bytes(genuine_item()) + b"\0" * 30, IntegrityError, "no zip end record"),
}


@pytest.mark.parametrize("name", ZIPS)
def test_a_malformed_archive_is_refused(path: Path, name: str) -> None:
    content, kind, message = ZIPS[name]
    append_item(path, "norm", content)
    refused(path, kind, message)


def test_records_must_not_overlap(path: Path) -> None:
    """Two directory entries that share bytes let two readers see two contents."""
    item = genuine_item()
    entry = item.rindex(b"archive/data/0") - 46
    size = (7 * 4 + 64).to_bytes(4, "little")
    item[entry + 20 : entry + 28] = size + size
    append_item(path, "norm", bytes(item))
    refused(path, IntegrityError, "archive/data/0 overlaps what follows it")


def test_every_truncation_of_an_item_is_refused(path: Path) -> None:
    item = genuine_item()
    for end in range(1, len(item), 7):
        append_item(path, "norm", bytes(item[:end]))
        refused(path, IntegrityError, "norm at")


def test_any_changed_byte_of_metadata_is_survived(path: Path) -> None:
    genuine = (path / ".metadata").read_bytes()
    generator = torch.Generator().manual_seed(5)
    for at in torch.randint(len(genuine), (300,), generator=generator).tolist():
        changed = bytearray(genuine)
        changed[at] ^= 1 << (at % 8)
        (path / ".metadata").write_bytes(changed)
        try:
            read(path)
        except GptossError as error:
            assert "\n" not in str(error)


def rewrite_common(path: Path, pickled: bytes, crc: int | None = None) -> None:
    content = archive_of({"c/data.pkl": pickled, "c/version": b"3\n"})
    if crc is not None:
        genuine = zlib.crc32(pickled).to_bytes(4, "little")
        content = content.replace(genuine, crc.to_bytes(4, "little"))
    (path / "common.pt").write_bytes(content)


def test_common_pt_must_match_its_checksum(path: Path) -> None:
    rewrite_common(path, pickle.dumps({"a": 1}), crc=12345)
    refused(path, IntegrityError, r"^common\.pt: data\.pkl does not match its checksum")
    rewrite_common(path, pickle.dumps({"a": 1}), crc=0)
    assert read(path).common == {"a": 1}


def test_common_pt_must_be_a_dict(path: Path) -> None:
    rewrite_common(path, pickle.dumps([1, 2]))
    refused(path, InputError, r"^common\.pt: expected a dict, found list")


def laughs(levels: int, opener: bytes) -> bytes:
    """Each level holds the level below twice: 2**levels values in a few bytes."""
    body = b"".join(b"q\x01h\x01" + opener for _ in range(levels))
    return b"\x80\x02}X\x01\x00\x00\x00aK\x00" + body + b"s."


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (laughs(80, b"\x86"), "expands to too many"),
        (b"\x80\x02}X\x01\x00\x00\x00aK\x00" + b"\x85" * 5000 + b"s.", "nests too deep"),
        (b"\x80\x02}q\x00X\x01\x00\x00\x00ah\x00s.", "nests too deep"),
    ],
    ids=["laughs", "deep", "cycle"],
)
def test_common_pt_that_expands_without_bound_is_refused(
    path: Path, pickled: bytes, message: str
) -> None:
    rewrite_common(path, pickled)
    refused(path, InputError, message)


@pytest.mark.parametrize("size", [1 << 60, (1 << 62) + 1])
def test_huge_sizes_allocate_nothing(path: Path, size: int) -> None:
    replace(path, "norm", (0,), length=size)
    refused(path, IntegrityError, "truncated")
    replace(path, "norm", (0,), offset=size, length=10)
    refused(path, IntegrityError, "truncated")


def test_a_huge_declared_shape_is_an_uncovered_tensor(path: Path) -> None:
    def edit(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["norm"]
        assert isinstance(entry, TensorStorageMetadata)
        entry.size = torch.Size([1 << 40])
        entry.chunks = [ChunkStorageMetadata(torch.Size([0]), torch.Size([7]))]

    change(path, edit)
    refused(path, IntegrityError, r"^norm: no chunk covers index 7 of axis 0")


def boxes(*parts: tuple[tuple[int, ...], tuple[int, ...]]) -> list[ChunkBox]:
    return [ChunkBox(start, extent) for start, extent in parts]


def test_an_irregular_tiling_is_accepted() -> None:
    """A pinwheel: no line crosses the whole tensor between its five boxes."""
    pinwheel = boxes(
        ((0, 0), (1, 2)), ((0, 2), (2, 1)), ((1, 0), (2, 1)), ((2, 1), (1, 2)), ((1, 1), (1, 1))
    )
    require_tiling((3, 3), pinwheel)
    for left_out in range(5):
        rest = pinwheel[:left_out] + pinwheel[left_out + 1 :]
        with pytest.raises(IntegrityError, match="no chunk covers"):
            require_tiling((3, 3), rest)
    with pytest.raises(IntegrityError, match="overlap"):
        require_tiling((3, 3), [*pinwheel[:4], ChunkBox((1, 1), (2, 1))])


def test_a_tiling_is_accepted_exactly_if_each_element_is_in_one_box() -> None:
    generator = torch.Generator().manual_seed(11)
    verdicts = {True: 0, False: 0}
    for _ in range(600):
        count = torch.zeros(3, 4, dtype=torch.int)
        found: list[ChunkBox] = []
        for row in range(0, 3, 1):
            cut = int(torch.randint(1, 4, (1,), generator=generator))
            spans = [(0, cut), (cut, 4 - cut)]
            if torch.rand(1, generator=generator) < 0.15:
                spans[0] = (int(torch.randint(0, 2, (1,), generator=generator)), cut)
            for start, size in spans:
                box = ChunkBox((row, start), (1, size))
                if start + size <= 4 and box not in found:
                    found.append(box)
                    count[row, start : start + size] += 1
        expected = bool((count == 1).all())
        verdicts[expected] += 1
        if expected:
            require_tiling((3, 4), found)
        else:
            with pytest.raises(IntegrityError):
                require_tiling((3, 4), found)
    assert min(verdicts.values()) > 50


def test_a_box_given_twice_is_not_two_boxes() -> None:
    with pytest.raises(IntegrityError):
        require_tiling((2,), boxes(((0,), (1,)), ((0,), (1,))))


def test_a_read_beyond_the_file_allocates_nothing(path: Path) -> None:
    with open_file(path, "metadata.json") as opened:
        for offset, size in ((0, 1 << 60), (1 << 63, 1), (-1, 1), (opened.size, 1)):
            with pytest.raises(IntegrityError, match=r"/metadata\.json: truncated"):
                opened.read_at(offset, size)


def test_a_tiling_that_would_take_quadratic_time_is_refused() -> None:
    crossing = boxes(*(((0, i), (2000, 1)) for i in range(500)))
    crossing += boxes(*(((i, 500), (1, 500)) for i in range(2000)))
    with pytest.raises(InputError, match="too irregular"):
        require_tiling((2000, 1000), crossing)

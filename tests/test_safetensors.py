"""The safetensors container: damaged files are refused by name, written ones are the library's."""

from __future__ import annotations

import json
import os
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from gptoss_convert.containers import TensorSpec, safetensors, safetensors_writer
from gptoss_convert.containers.paths import open_inside, safe_name
from gptoss_convert.errors import GptossError, InputError, IntegrityError

FILE = "model.safetensors"


def entry(dtype: str, shape: list[Any], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def stored(header: object, data: int = 8) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(data)


def refusal(root: Path, content: bytes, kind: type[GptossError]) -> str:
    """The message without the path of the file."""
    path = root / FILE
    path.write_bytes(content)
    with pytest.raises(kind) as refused:
        safetensors.read_header(root, FILE)
    assert refused.type is kind
    assert "\n" not in str(refused.value)
    return str(refused.value).removeprefix(f"{path}: ")


A = entry("U8", [8], 0, 8)
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:16d0\nsize 4792272488\n"

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "empty file"),
    "Git LFS pointer": (
        LFS,
        "a Git LFS pointer, not weights (expects 4792272488 bytes); fetch the file: git lfs pull",
    ),
    "HTML page": (
        b"<!DOCTYPE html><html><body>503</body></html>",
        "looks like an HTML page, not safetensors; download it again",
    ),
    "JSON text": (
        b'{"error":"Repository not found"}',
        "looks like JSON text, not safetensors; download it again",
    ),
    "gzip": (
        b"\x1f\x8b" + b"\xff" * 30,
        "a compressed archive, not safetensors; unpack it first",
    ),
    "zip": (b"PK\x03\x04" + b"\xff" * 30, "a compressed archive, not safetensors; unpack it first"),
    "header longer than the file": (
        struct.pack("<Q", 1 << 63) + bytes(92),
        "no safetensors header in 100 bytes: truncated, or another format",
    ),
    "no data": (
        stored({"a": A}, 0),
        "truncated: the header describes 76 bytes, the file has 68",
    ),
    "trailing bytes": (
        stored({"a": A}, 9),
        "trailing bytes: the header describes 76 bytes, the file has 77",
    ),
    "leading space": (stored(b' {"a":1}'), "header does not start with '{'"),
    "not UTF-8": (stored(b'{"\xff":1}'), "header is not UTF-8 at byte 2"),
    "not JSON": (
        stored(b'{"a":'),
        "header: not JSON: Expecting value: line 1 column 6 (char 5)",
    ),
    "a number that is none": (
        stored(b'{"a":NaN}'),
        "header: not JSON: NaN is not a JSON number",
    ),
    "deep nesting": (
        stored(b'{"a":' + b"[" * 200_000),
        "header: not JSON that anybody writes: nested too deep",
    ),
    "tensor twice": (
        stored(b'{"a":1,"a":2}'),
        "header: key 'a' appears twice",
    ),
    "metadata of numbers": (
        stored({"__metadata__": {"a": 1}}),
        "__metadata__ is not a map of strings",
    ),
    "metadata no map": (stored({"__metadata__": []}), "__metadata__ is not a map of strings"),
    "hole": (
        stored({"a": entry("U8", [4], 0, 4), "b": entry("U8", [3], 5, 8)}),
        "b: starts at byte 133, expected 132: leaves a hole before it",
    ),
    "overlap": (
        stored({"a": entry("U8", [5], 0, 5), "b": entry("U8", [4], 4, 8)}),
        "b: starts at byte 132, expected 133: overlaps the tensor before it",
    ),
    "shape and offsets disagree": (
        stored({"a": entry("BF16", [3], 0, 8)}),
        "a: BF16 [3] takes 6 bytes, offsets span 8",
    ),
    "offsets backwards": (
        stored({"a": entry("U8", [8], 8, 0)}),
        "a: U8 [8] takes 8 bytes, offsets span -8",
    ),
    "shape that overflows 64 bits": (
        stored({"a": entry("U8", [1 << 40, 1 << 40], 0, 8)}),
        f"a: U8 [{1 << 40}, {1 << 40}] takes {1 << 80} bytes, offsets span 8",
    ),
    "negative length": (
        stored({"a": entry("U8", [-8], 0, 8)}),
        "a: shape [-8] or offsets [0, 8] malformed",
    ),
    "length that is a float": (
        stored({"a": entry("U8", [8.0], 0, 8)}),
        "a: shape [8.0] or offsets [0, 8] malformed",
    ),
    "length that is true": (
        stored({"a": entry("U8", [True, 8], 0, 8)}),
        "a: shape [True, 8] or offsets [0, 8] malformed",
    ),
    "three offsets": (
        stored({"a": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8, 8]}}),
        "a: shape [8] or offsets [0, 8, 8] malformed",
    ),
    "dtype of another type": (
        stored({"a": {"dtype": ["U8"], "shape": [8], "data_offsets": [0, 8]}}),
        "a: dtype ['U8'] is not a string",
    ),
    "entry without dtype": (
        stored({"a": {"shape": [8]}}),
        "a: expects dtype, shape and data_offsets, found {'shape': [8]}",
    ),
    "entry with another key": (
        stored({"a": {**A, "x": 1}}),
        "a: expects dtype, shape and data_offsets, found "
        "{'dtype': 'U8', 'shape': [8], 'data_offsets': [0, 8], 'x': 1}",
    ),
    "header that is a list": (
        stored(b"[]"),
        "header does not start with '{'",
    ),
}


@pytest.mark.parametrize("fault", DAMAGED)
def test_a_damaged_file_is_refused_with_the_exact_message(fault: str, tmp_path: Path):
    content, message = DAMAGED[fault]
    assert refusal(tmp_path, content, IntegrityError) == message


UNSUPPORTED: dict[str, tuple[bytes, str]] = {
    "unknown dtype": (
        stored({"a": entry("F4", [16], 0, 8)}),
        "a: dtype 'F4' is unknown; expects U8, BF16, F16, F32, F8_E4M3, F8_E8M0",
    ),
    "dtype of other models": (
        stored({"a": entry("F8_E5M2", [8], 0, 8)}),
        "a: dtype 'F8_E5M2' has no place in GPT-OSS; expects U8, BF16, F16, F32, F8_E4M3, F8_E8M0",
    ),
    "empty tensor": (
        stored({"a": entry("U8", [0, 4], 0, 0)}, 0),
        "a: empty tensor of shape [0, 4]",
    ),
    "control character": (
        stored({"a\nb": A}),
        "tensor name 'a\\nb' is not acceptable",
    ),
    "path as a name": (stored({"../a": A}), "tensor name '../a' is not acceptable"),
    "long name": (stored({"a" * 513: A}), f"tensor name {'a' * 80!r} is not acceptable"),
}


@pytest.mark.parametrize("fault", UNSUPPORTED)
def test_what_gpt_oss_never_has_is_refused_with_the_exact_message(fault: str, tmp_path: Path):
    content, message = UNSUPPORTED[fault]
    assert refusal(tmp_path, content, InputError) == message


def test_a_header_beyond_the_limit_is_never_read(tmp_path: Path):
    with (tmp_path / FILE).open("wb") as file:
        file.write(struct.pack("<Q", 200_000_000) + b"{")
        file.truncate(200_000_100)
    with pytest.raises(IntegrityError, match="header of 200000000 bytes, at most 100000000"):
        safetensors.read_header(tmp_path, FILE)


def test_a_header_of_too_many_tensors_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 1)
    content = stored({"a": entry("U8", [4], 0, 4), "b": entry("U8", [4], 4, 8)})
    assert refusal(tmp_path, content, InputError) == "2 tensors, at most 1"


@given(st.binary(max_size=200), st.integers(0, 250))
def test_random_headers_are_read_or_refused_but_never_crash(
    tmp_path_factory: pytest.TempPathFactory, text: bytes, data: int
):
    root = tmp_path_factory.getbasetemp()
    (root / "random.safetensors").write_bytes(stored(b"{" + text, data))
    with suppress(GptossError):
        safetensors.read_header(root, "random.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@given(JSON, JSON, JSON)
def test_entries_of_any_json_are_read_or_refused_but_never_crash(
    dtype: object, shape: object, offsets: object
):
    text = json.dumps({"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}})
    with suppress(GptossError):
        safetensors.parse_header("x", "x", text.encode(), 8)


def test_what_the_reference_library_wrote_is_read_in_full(tmp_path: Path):
    tensors = {
        "b": torch.arange(12, dtype=torch.uint8).reshape(3, 4),
        "a": torch.ones(5, dtype=torch.bfloat16),
        "c": torch.ones((), dtype=torch.float32),
    }
    save_file(tensors, tmp_path / FILE, metadata={"format": "pt"})
    header = safetensors.read_header(tmp_path, FILE)
    raw = (tmp_path / FILE).read_bytes()
    assert header.metadata == {"format": "pt"}
    for chunk in header.chunks:
        stored_bytes = raw[chunk.offset : chunk.offset + chunk.nbytes]
        tensor = tensors[chunk.tensor]
        assert stored_bytes == tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert chunk.shape == chunk.extent == tuple(tensor.shape)
        assert set(chunk.start) <= {0}


TENSORS = {
    "z.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b.scales": torch.arange(5, dtype=torch.uint8),
    "a.weight": torch.ones(4, 2, dtype=torch.bfloat16),
    "ä.weight": torch.zeros(3, dtype=torch.bfloat16),
    "c.half": torch.ones(3, dtype=torch.float16),
}
NAMES = {torch.float32: "F32", torch.uint8: "U8", torch.bfloat16: "BF16", torch.float16: "F16"}
SPECS = [TensorSpec(n, NAMES[t.dtype], tuple(t.shape)) for n, t in TENSORS.items()]


def written(text: str) -> bytes:
    """The file that a planned header makes of TENSORS."""
    image, chunks = safetensors_writer.file_image(FILE, text)
    content = bytearray(image.size)
    for offset, part in image.fixed:
        content[offset : offset + len(part)] = part
    for chunk in chunks:
        raw = TENSORS[chunk.tensor].reshape(-1).view(torch.uint8).numpy().tobytes()
        content[chunk.offset : chunk.offset + chunk.nbytes] = raw
    return bytes(content)


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}])
def test_the_reference_order_makes_the_reference_librarys_file(
    tmp_path: Path, metadata: dict[str, str]
):
    save_file(TENSORS, tmp_path / FILE, metadata=metadata or None)
    text = safetensors_writer.header_text(safetensors_writer.reference_order(SPECS), metadata, 8)
    assert written(text) == (tmp_path / FILE).read_bytes()


def test_a_padded_file_is_read_by_the_reference_library(tmp_path: Path):
    text = safetensors_writer.header_text(
        safetensors_writer.aligned_order(SPECS), {"format": "pt"}, 4096
    )
    (tmp_path / FILE).write_bytes(written(text))
    with safe_open(tmp_path / FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert all(torch.equal(file.get_tensor(name), TENSORS[name]) for name in file.keys())  # noqa: SIM118
        assert set(file.keys()) == set(TENSORS)
    assert (8 + len(text.encode())) % 4096 == 0


def test_whole_pages_come_first_so_that_they_start_on_pages():
    specs = [
        TensorSpec("small", "U8", (5,)),
        TensorSpec("large", "U8", (2, 4096)),
        TensorSpec("other", "BF16", (4096,)),
    ]
    assert [s.name for s in safetensors_writer.aligned_order(specs)] == ["large", "other", "small"]


def write_shards(root: Path, shards: dict[str, list[str]]) -> None:
    for file, names in shards.items():
        save_file({n: torch.ones(4, dtype=torch.bfloat16) for n in names}, root / file)


def write_index(root: Path, weight_map: object) -> None:
    (root / safetensors.INDEX).write_text(json.dumps({"weight_map": weight_map}))


ONE, TWO = "model-00000-of-00001.safetensors", "model-00001-of-00001.safetensors"


def directory_refusal(root: Path, kind: type[GptossError]) -> str:
    with pytest.raises(kind) as refused:
        safetensors.read_directory(root)
    assert refused.type is kind
    return str(refused.value).replace(f"{root}/", "")


def test_shards_without_an_index_are_read_if_no_tensor_repeats(tmp_path: Path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]})
    chunks, headers = safetensors.read_directory(tmp_path)
    assert {chunk.tensor: chunk.file for chunk in chunks} == {"a": ONE, "b": TWO}
    assert [*headers] == [ONE, TWO]


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b", "a"]})
    assert directory_refusal(tmp_path, IntegrityError) == f"a: stored in {ONE} and again in {TWO}"


def test_all_missing_shards_are_listed(tmp_path: Path):
    write_shards(tmp_path, {ONE: ["a"]})
    write_index(tmp_path, {"a": ONE, "b": TWO, "c": "x.safetensors"})
    assert directory_refusal(tmp_path, IntegrityError) == (
        f"{safetensors.INDEX}: 2 of 3 shards missing: {TWO}, x.safetensors"
    )


def test_index_and_shards_must_agree(tmp_path: Path):
    write_shards(tmp_path, {ONE: ["a"], TWO: ["b"]})
    write_index(tmp_path, {"a": ONE, "b": ONE, "c": TWO})
    assert directory_refusal(tmp_path, IntegrityError) == (
        f"{safetensors.INDEX}: b: expected in {ONE}, found {TWO}"
    )
    write_index(tmp_path, {"a": ONE, "b": TWO, "c": TWO})
    assert directory_refusal(tmp_path, IntegrityError) == (
        f"{safetensors.INDEX}: c: expected in {TWO}, found nowhere"
    )
    write_shards(tmp_path, {ONE: ["a", "x"]})
    write_index(tmp_path, {"a": ONE, "b": TWO})
    assert directory_refusal(tmp_path, IntegrityError) == (
        f"{safetensors.INDEX}: x of {ONE} is not in the index"
    )


@pytest.mark.parametrize(
    "name",
    [
        "../a.safetensors",
        "/etc/a.safetensors",
        "x/a.safetensors",
        "C:a.safetensors",
        "\\\\host\\a.safetensors",
        "a\x00.safetensors",
        "..",
        "",
        ".",
        "a" * 300 + ".safetensors",
    ],
)
def test_an_index_that_leads_out_of_the_directory_is_refused(tmp_path: Path, name: str):
    write_shards(tmp_path, {ONE: ["a"]})
    write_index(tmp_path, {"a": name})
    assert directory_refusal(tmp_path, InputError) == (
        f"{safetensors.INDEX}: a: file name {name!r} leaves the directory"
    )


def test_an_index_of_pickled_files_is_refused(tmp_path: Path):
    write_index(tmp_path, {"a": "pytorch_model.bin"})
    assert directory_refusal(tmp_path, InputError) == (
        f"{safetensors.INDEX}: a: 'pytorch_model.bin' is not a safetensors file"
    )


@pytest.mark.parametrize("weight_map", [None, [], {}, "x"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object):
    write_index(tmp_path, weight_map)
    assert directory_refusal(tmp_path, IntegrityError) == f"{safetensors.INDEX}: no weight_map"


def test_links_lead_nowhere_but_to_the_hub_caches_blobs(tmp_path: Path):
    outside = tmp_path / "outside.safetensors"
    save_file(TENSORS, outside)
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    blobs = tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "123").write_bytes(outside.read_bytes())
    (snapshot / FILE).symlink_to("../../blobs/123")
    assert len(safetensors.read_header(snapshot, FILE).chunks) == len(TENSORS)
    (snapshot / "link.safetensors").symlink_to(outside)
    with pytest.raises(InputError, match=r"link.safetensors: links to .*, outside the checkpoint"):
        safetensors.read_header(snapshot, "link.safetensors")
    (snapshot / "gone.safetensors").symlink_to("../../blobs/456")
    with pytest.raises(IntegrityError, match=r"gone.safetensors: dangling link"):
        safetensors.read_header(snapshot, "gone.safetensors")


def test_what_is_no_file_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "loop").symlink_to("loop")
    for name, kind, message in (
        ("pipe", InputError, "not a regular file"),
        ("folder", InputError, "not a regular file"),
        ("absent", IntegrityError, "no such file"),
    ):
        with pytest.raises(kind, match=message):
            open_inside(tmp_path, name)
    with pytest.raises(GptossError, match=r"loop: "):
        open_inside(tmp_path, "loop")


def test_safe_names_are_plain_on_every_system():
    assert safe_name("model-00000-of-00002.safetensors")
    assert safe_name("a/b", folders=True)
    assert not safe_name("a/b")
    for name in ("a//b", "a/../b", "/a", "a/", "a\\b", "a:b", "a?b", "a\nb", "a*b"):
        assert not safe_name(name, folders=True)

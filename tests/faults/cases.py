"""Bad directories, built by code: one entry for each fault that a directory can have.

Each case takes a fresh copy of a good directory, spoils it, and states the exit status and the
error line, `DIR` standing for the directory and `*` for any text. Numbers are those of
docs/faults.md.
"""

from __future__ import annotations

import gzip
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Spoil = Callable[[Path], object]
SHARD = "model.safetensors"
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Case:
    """A fault: the good directory it starts from, what spoils it, what every command says."""

    number: int
    name: str
    start: str
    """`one`: HF MXFP4 in a single file; `many`: with an index; `bf16`, `openai`, `megatron`."""
    spoil: Spoil
    status: int
    error: str
    words: tuple[str, ...] = ()
    """More words of the command line."""
    reads: bool = False
    """Only reading the weights shows it: `convert` and `check --read-data`, not `inspect`."""


CASES: list[Case] = []


def case(
    number: int, start: str, status: int, error: str, *words: str, reads: bool = False
) -> Callable[[Spoil], Spoil]:
    """Enter a spoiling function as a case."""

    def enter(spoil: Spoil) -> Spoil:
        name = spoil.__name__
        CASES.append(Case(number, name, start, spoil, status, error, words, reads))
        return spoil

    return enter


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header of a safetensors file and the bytes behind it."""
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(path: Path, header: dict[str, Any] | bytes, rest: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + rest)


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    header, rest = header_of(path)
    edit(header)
    write_header(path, header, rest)


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def edit_config(path: Path, **changes: Any) -> None:
    edit_json(path / "config.json", lambda content: content.update(changes))


def overwrite(path: Path, tensor: str, content: bytes, at: int = 0) -> None:
    """Replace bytes of a tensor."""
    header, _ = header_of(path)
    start = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
    with path.open("r+b") as stream:
        stream.seek(start + header[tensor]["data_offsets"][0] + at)
        stream.write(content)


def bytes_of(path: Path, tensor: str) -> int:
    begin, end = header_of(path)[0][tensor]["data_offsets"]
    return end - begin


def shards(path: Path) -> list[Path]:
    return sorted(path.glob("model-*.safetensors"))


# Files and download


@case(
    1,
    "one",
    4,
    "DIR/model.safetensors: a Git LFS pointer, not weights (expects 4798702184 bytes)*",
)
def lfs_pointer(path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:16d0\nsize 4798702184\n"
    (path / SHARD).write_text(text)


@case(2, "one", 4, "DIR/model.safetensors: looks like an HTML page*")
def html_page(path: Path) -> None:
    (path / SHARD).write_text("<!DOCTYPE html><html><title>429</title>" + " " * 500)


@case(2, "one", 4, "DIR/model.safetensors: looks like JSON text*")
def json_error_page(path: Path) -> None:
    (path / SHARD).write_text('{"error": "Invalid credentials"}')


@case(
    2, "one", 4, "DIR/chat_template.jinja: looks like an HTML page; download it again*", reads=True
)
def html_page_as_template(path: Path) -> None:
    (path / "chat_template.jinja").write_text("<!DOCTYPE html><html><title>429</title></html>")


@case(2, "one", 4, "DIR/tokenizer.json: an error's answer; download it again*", reads=True)
def json_error_as_tokenizer(path: Path) -> None:
    (path / "tokenizer.json").write_text('{"error": "Invalid credentials in Authorization header"}')


@case(3, "one", 4, "DIR/model.safetensors: empty file")
def empty_file(path: Path) -> None:
    (path / SHARD).write_bytes(b"")


@case(4, "one", 4, "DIR/model.safetensors: truncated: the header describes * bytes, the file has *")
def truncated_shard(path: Path) -> None:
    os.truncate(path / SHARD, (path / SHARD).stat().st_size - 1)


@case(4, "one", 4, "DIR/model.safetensors: no safetensors header in 500 bytes: truncated*")
def truncated_header(path: Path) -> None:
    os.truncate(path / SHARD, 500)


@case(5, "one", 4, "DIR/model.safetensors: trailing bytes: the header describes * bytes, the file*")
def trailing_bytes(path: Path) -> None:
    with (path / SHARD).open("ab") as stream:
        stream.write(b"\0")


@case(6, "one", 4, "DIR: an unfinished download (*.incomplete); run it again")
def incomplete_download(path: Path) -> None:
    (path / SHARD).rename(path / "model.safetensors.incomplete")


@case(7, "one", 4, "DIR/model.safetensors: dangling link")
def dangling_link(path: Path) -> None:
    (path / SHARD).unlink()
    (path / SHARD).symlink_to(path / "blobs" / "gone")


@case(6, "one", 4, "DIR: an unfinished download (*.part); run it again")
def partial_download(path: Path) -> None:
    (path / SHARD).rename(path / "model.safetensors.part")


@case(6, "openai", 4, "DIR: an unfinished download (.cache/*/download/x.incomplete); run it again")
def download_into_a_directory(path: Path) -> None:
    """`hf download --local-dir` keeps what is not whole in a hidden folder."""
    folder = path / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (path / SHARD).rename(folder / "x.incomplete")


def _dangle(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to("gone")


@case(7, "one", 4, "DIR/config.json: dangling link")
def dangling_config(path: Path) -> None:
    _dangle(path / "config.json")


@case(7, "many", 4, "DIR/model.safetensors.index.json: dangling link")
def dangling_index(path: Path) -> None:
    _dangle(path / INDEX)


@case(7, "one", 4, "DIR/tokenizer.json: dangling link")
def dangling_tokenizer(path: Path) -> None:
    _dangle(path / "tokenizer.json")


@case(7, "bf16", 4, "DIR/mxfp4-scales: dangling link")
def dangling_sidecar(path: Path) -> None:
    _dangle(path / "mxfp4-scales")


@case(7, "megatron", 4, "DIR/latest_checkpointed_iteration.txt: dangling link")
def dangling_tracker(path: Path) -> None:
    _dangle(path / "latest_checkpointed_iteration.txt")


@case(7, "megatron", 4, "DIR/hf: dangling link")
def dangling_folder(path: Path) -> None:
    _dangle(path / "hf")


@case(7, "megatron", 4, "DIR/iter_*/common.pt: dangling link")
def dangling_common_state(path: Path) -> None:
    _dangle(iteration(path) / "common.pt")


@case(8, "one", 4, "DIR/model.safetensors: a compressed archive, not safetensors*")
def gzip_in_disguise(path: Path) -> None:
    (path / SHARD).write_bytes(gzip.compress(os.urandom(4000)))


@case(8, "one", 4, "DIR/model.safetensors: a compressed archive, not safetensors*")
def zip_in_disguise(path: Path) -> None:
    shutil.make_archive(str(path / "pack"), "zip", path, "config.json")
    (path / "pack.zip").rename(path / SHARD)


@case(9, "many", 4, "DIR/model.safetensors.index.json: 2 of * shards missing: model-00001-of-*")
def missing_shards(path: Path) -> None:
    for shard in shards(path)[:2]:
        shard.unlink()


@case(
    10,
    "many",
    4,
    "DIR/model.safetensors.index.json: does not name spare.safetensors: not read*",
    "--strict",
)
def spare_shard(path: Path) -> None:
    shutil.copy(shards(path)[0], path / "spare.safetensors")


@case(
    12,
    "many",
    3,
    "DIR/model.safetensors.index.json: *: file name '../x.safetensors' leaves the*",
)
def index_climbs_out(path: Path) -> None:
    _point_index(path, "../x.safetensors")


@case(10, "megatron", 4, "DIR/iter_*/.metadata: does not name __9_0.distcp: not read*", "--strict")
def spare_distcp(path: Path) -> None:
    (iteration(path) / "__9_0.distcp").write_bytes(b"of an earlier save")


@case(12, "many", 3, "DIR/model.safetensors.index.json: *: file name '/etc/x.safetensors' leaves*")
def index_is_absolute(path: Path) -> None:
    _point_index(path, "/etc/x.safetensors")


@case(12, "many", 3, "DIR/model.safetensors.index.json: *: file name * leaves the directory")
def index_names_a_drive(path: Path) -> None:
    _point_index(path, "C:x.safetensors")


@case(12, "many", 3, "DIR/model.safetensors.index.json: *: file name * leaves the directory")
def index_names_a_share(path: Path) -> None:
    _point_index(path, "\\\\host\\share\\x.safetensors")


@case(12, "many", 3, "DIR/model.safetensors.index.json: *: file name * leaves the directory")
def index_holds_a_nul(path: Path) -> None:
    _point_index(path, "x\0.safetensors")


@case(12, "many", 3, "DIR/model.safetensors.index.json: *: file name 'xxx*' leaves the directory")
def index_names_256_bytes(path: Path) -> None:
    _point_index(path, "x" * 200 + "\xe9" * 22 + ".safetensors")


@case(12, "many", 3, "DIR/model.safetensors.index.json: *: file name 'a\\ud800.safe*' leaves *")
def index_holds_half_a_character(path: Path) -> None:
    _point_index(path, "a\ud800.safetensors")


@case(15, "many", 4, "DIR/model.safetensors.index.json: not UTF-8 at byte 2")
def index_is_not_utf8(path: Path) -> None:
    text = (path / INDEX).read_bytes()
    (path / INDEX).write_bytes(text.replace(b'{\n  "metadata"', b'{"\xff": 1, "metadata"', 1))


@case(13, "many", 3, "DIR/model.safetensors.index.json: *: 'x.bin' is not a safetensors file")
def index_points_to_a_pickle(path: Path) -> None:
    _point_index(path, "x.bin")


def _point_index(path: Path, name: str) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["weight_map"][next(iter(content["weight_map"]))] = name

    edit_json(path / INDEX, edit)


@case(
    14, "one", 3, "DIR/model.safetensors: links to *, outside the checkpoint; pass --follow-links*"
)
def shard_links_out(path: Path) -> None:
    outside = path.parent / "outside.safetensors"
    (path / SHARD).rename(outside)
    (path / SHARD).symlink_to(outside)


@case(15, "many", 4, "DIR/model.safetensors.index.json: *: expected in *, found nowhere")
def index_key_without_tensor(path: Path) -> None:
    edit_json(path / INDEX, lambda c: c["weight_map"].update({"x": shards(path)[0].name}))


@case(15, "many", 4, "DIR/model.safetensors.index.json: * is not in the index")
def tensor_without_index_key(path: Path) -> None:
    edit_json(path / INDEX, lambda c: c["weight_map"].pop("model.norm.weight"))


@case(16, "many", 4, "*: stored in * and again in *")
def tensor_in_two_shards(path: Path) -> None:
    first, second, *_ = shards(path)
    header, rest = header_of(first)
    name = next(iter(set(header_of(second)[0]) - {"__metadata__"}))
    entry = header_of(second)[0][name]
    length = entry["data_offsets"][1] - entry["data_offsets"][0]
    header[name] = {**entry, "data_offsets": [len(rest), len(rest) + length]}
    write_header(first, header, rest + bytes(length))


@case(
    17,
    "many",
    4,
    "DIR/model.safetensors.index.json: total_size is 7, the tensors take * bytes*",
    "--strict",
)
def wrong_total(path: Path) -> None:
    edit_json(path / INDEX, lambda content: content["metadata"].update(total_size=7))


@case(19, "one", 2, "DIR: holds hf and openai; choose one with --from")
def two_formats(path: Path) -> None:
    shutil.copytree(path.parent / "starts" / "openai", path / "original")


# safetensors structure


@case(20, "one", 4, "DIR/model.safetensors: no safetensors header in * bytes*")
def header_longer_than_the_file(path: Path) -> None:
    _length(path, (path / SHARD).stat().st_size)


@case(20, "one", 4, "DIR/model.safetensors: no safetensors header in * bytes*")
def header_of_two_to_the_63(path: Path) -> None:
    _length(path, 1 << 63)


@case(20, "one", 4, "DIR/model.safetensors: header of 100000001 bytes, at most 100000000")
def header_of_more_than_100_mb(path: Path) -> None:
    os.truncate(path / SHARD, 200_000_000)
    _length(path, 100_000_001)


def _length(path: Path, length: int) -> None:
    with (path / SHARD).open("r+b") as stream:
        stream.write(struct.pack("<Q", length))


@case(21, "one", 4, "DIR/model.safetensors: header is not UTF-8 at byte 2")
def header_is_not_utf8(path: Path) -> None:
    write_header(path / SHARD, b'{"\xff": 1}', b"")


@case(21, "one", 4, "DIR/model.safetensors: header: not JSON: *")
def header_is_not_json(path: Path) -> None:
    write_header(path / SHARD, b"{nonsense}", b"")


@case(21, "one", 4, "DIR/model.safetensors: header: not JSON*nested too deep")
def header_is_nested(path: Path) -> None:
    write_header(path / SHARD, b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", b"")


@case(21, "one", 4, "DIR/config.json: not JSON that anybody writes: nested too deep")
def config_is_nested(path: Path) -> None:
    """Few enough levels to parse, too many for whoever prints the value."""
    (path / "config.json").write_text('{"model_type": ' + "[" * 900 + "]" * 900 + "}")


@case(22, "one", 4, "DIR/model.safetensors: header: key 'lm_head.weight' appears twice")
def tensor_named_twice(path: Path) -> None:
    header, rest = header_of(path / SHARD)
    entry = json.dumps(header["lm_head.weight"]).encode()
    text = json.dumps(header).encode()
    write_header(path / SHARD, b'{"lm_head.weight": ' + entry + b", " + text[1:], rest)


@case(
    23,
    "one",
    4,
    "DIR/model.safetensors: *: starts at byte *, expected *: leaves a hole before it",
)
def hole(path: Path) -> None:
    header, rest = header_of(path / SHARD)
    for entry in header.values():
        if "data_offsets" in entry:
            entry["data_offsets"] = [at + 8 for at in entry["data_offsets"]]
    write_header(path / SHARD, header, bytes(8) + rest)


@case(24, "one", 4, "DIR/model.safetensors: *: starts at byte *: overlaps the tensor before it")
def overlap(path: Path) -> None:
    def edit(header: dict[str, Any]) -> None:
        second = sorted((e["data_offsets"] for n, e in header.items() if n != "__metadata__"))[1]
        second[:] = [second[0] - 2, second[1] - 2]

    edit_header(path / SHARD, edit)


@case(
    25,
    "one",
    4,
    "DIR/model.safetensors: model.norm.weight: BF16 [[]225] takes 450 bytes, offsets*",
)
def shape_of_other_size(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header["model.norm.weight"].update(shape=[225]))


@case(26, "one", 4, "DIR/model.safetensors: model.norm.weight: * takes * bytes, offsets span 448")
def shape_that_overflows(path: Path) -> None:
    edit_header(path / SHARD, lambda h: h["model.norm.weight"].update(shape=[1 << 50] * 4))


@case(27, "one", 4, "DIR/model.safetensors: model.norm.weight: shape [[]-224] or offsets *")
def negative_dimension(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header["model.norm.weight"].update(shape=[-224]))


@case(27, "one", 4, "DIR/model.safetensors: model.norm.weight: shape [[]224.0] or offsets *")
def float_dimension(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header["model.norm.weight"].update(shape=[224.0]))


@case(27, "one", 4, "DIR/model.safetensors: model.norm.weight: shape [[]224, True] or offsets *")
def bool_dimension(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header["model.norm.weight"].update(shape=[224, True]))


@case(28, "one", 3, "DIR/model.safetensors: model.norm.weight: dtype 'BF17' is unknown; expects *")
def unknown_dtype(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header["model.norm.weight"].update(dtype="BF17"))


@case(28, "one", 4, "DIR/model.safetensors: model.norm.weight: *dtype*")
def dtype_of_a_list(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header["model.norm.weight"].update(dtype=[]))


@case(29, "one", 3, "DIR/model.safetensors: tensor name 'a\\nb' is not acceptable")
def name_with_a_line_break(path: Path) -> None:
    _rename(path, "a\nb")


@case(29, "one", 3, "DIR/model.safetensors: tensor name '../../x' is not acceptable")
def name_that_climbs_out(path: Path) -> None:
    _rename(path, "../../x")


@case(29, "one", 3, "DIR/model.safetensors: tensor name 'xxx*' is not acceptable")
def name_of_513_characters(path: Path) -> None:
    _rename(path, "x" * 513)


def _rename(path: Path, name: str) -> None:
    edit_header(path / SHARD, lambda h: h.update({name: h.pop("model.norm.weight")}))


@case(30, "one", 3, "DIR/model.safetensors: x: empty tensor of shape [[]0]")
def empty_tensor(path: Path) -> None:
    entry = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    edit_header(path / SHARD, lambda header: header.update(x=entry))


@case(29, "one", 3, "DIR/model.safetensors: tensor name '' is not acceptable")
def name_of_nothing(path: Path) -> None:
    _rename(path, "")


@case(30, "one", 4, "DIR: no tensors in model.safetensors")
def no_tensors(path: Path) -> None:
    write_header(path / SHARD, b"{}", b"")


@case(31, "one", 4, "DIR/model.safetensors: header does not start with '{'")
def leading_space(path: Path) -> None:
    header, rest = header_of(path / SHARD)
    write_header(path / SHARD, b" " + json.dumps(header).encode(), rest)


@case(31, "one", 4, "DIR/model.safetensors: __metadata__ is not a map of strings")
def metadata_of_numbers(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header.update(__metadata__={"format": 1}))


@case(33, "one", 3, "DIR/model.safetensors: header: * values, at most 2000000 are read")
def a_million_tensors(path: Path) -> None:
    entries = ",".join(f'"{i}":{{}}' for i in range(1_000_000))
    write_header(path / SHARD, f"{{{entries}}}".encode(), b"")


# Content


@case(
    34,
    "bf16",
    4,
    "DIR: model.norm.weight: NaN at [[]3] (hidden), 2 bytes at * of model.safetensors; "
    "pass --allow-nonfinite*",
    reads=True,
)
def nan(path: Path) -> None:
    overwrite(path / SHARD, "model.norm.weight", b"\xc1\x7f", 6)


@case(
    34,
    "one",
    4,
    "DIR: model.layers.0.self_attn.k_proj.bias: -inf at [[]0, 0, 5] (layer kv_head head_dim)*",
    reads=True,
)
def infinity(path: Path) -> None:
    overwrite(path / SHARD, "model.layers.0.self_attn.k_proj.bias", b"\x80\xff", 10)


@case(
    35,
    "one",
    4,
    "DIR/model.safetensors: model.layers.0.mlp.experts.down_proj_scales: box *: block *: expected "
    "a scale byte 0..252, found 255, is NaN",
    reads=True,
)
def scale_that_is_nan(path: Path) -> None:
    overwrite(path / SHARD, "model.layers.0.mlp.experts.down_proj_scales", b"\xff")


@case(
    36,
    "one",
    4,
    "DIR/model.safetensors: model.layers.0.mlp.experts.gate_up_proj_scales: box *: block *: "
    "expected a scale byte 0..252, found 254*",
    reads=True,
)
def scale_that_overflows(path: Path) -> None:
    overwrite(path / SHARD, "model.layers.0.mlp.experts.gate_up_proj_scales", b"\xfe" * 100)


@case(
    35,
    "openai",
    4,
    "DIR/model.safetensors: block.0.mlp.mlp2_weight.scales: box *: block *: expected a scale byte*",
    reads=True,
)
def scale_that_is_nan_in_another_format(path: Path) -> None:
    overwrite(path / SHARD, "block.0.mlp.mlp2_weight.scales", b"\xff")


@case(
    37,
    "one",
    4,
    "DIR: 8 weight matrices are zero throughout, in model.layers.0.mlp.experts.down_proj_*",
    reads=True,
)
def blocks_of_zeros(path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    overwrite(path / SHARD, name, bytes(bytes_of(path / SHARD, name)))


@case(
    37,
    "bf16",
    4,
    "DIR: 1 weight matrices are zero throughout, in model.layers.0.mlp.experts.gate_up_proj*",
    reads=True,
)
def an_expert_of_zeros(path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    one = bytes_of(path / SHARD, name) // 8
    overwrite(path / SHARD, name, bytes(one), at=3 * one)


@case(
    37,
    "one",
    4,
    "DIR: 1 weight matrices are zero throughout, in lm_head.weight; pass --allow-zero*",
    reads=True,
)
def embedding_of_minus_zeros(path: Path) -> None:
    count = bytes_of(path / SHARD, "lm_head.weight") // 2
    overwrite(path / SHARD, "lm_head.weight", b"\0\x80" * count)


@case(38, "one", 4, "DIR: 1 tensors missing: model.layers.0.mlp.experts.down_proj_scales")
def blocks_without_scales(path: Path) -> None:
    drop(path / SHARD, "model.layers.0.mlp.experts.down_proj_scales")


@case(38, "one", 4, "DIR: 1 tensors missing: model.layers.0.mlp.experts.gate_up_proj_blocks")
def scales_without_blocks(path: Path) -> None:
    drop(path / SHARD, "model.layers.0.mlp.experts.gate_up_proj_blocks")


def drop(path: Path, *names: str) -> None:
    """Remove tensors from a file, its header and its bytes."""
    header, rest = header_of(path)
    metadata = header.pop("__metadata__", {})
    kept: dict[str, Any] = {}
    content = b""
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if name not in names:
            begin, end = entry["data_offsets"]
            kept[name] = {**entry, "data_offsets": [len(content), len(content) + end - begin]}
            content += rest[begin:end]
    write_header(path, {"__metadata__": metadata, **kept}, content)


@case(
    39,
    "one",
    3,
    "DIR: model.layers.0.mlp.experts.down_proj_blocks: layout * expects shape (8, 224, 5, "
    "16), found (8, 224, 10, 8)",
)
def blocks_of_8_bytes(path: Path) -> None:
    _reshape(path, "model.layers.0.mlp.experts.down_proj_blocks", [8, 224, 10, 8])


def _reshape(path: Path, name: str, shape: list[int]) -> None:
    edit_header(path / SHARD, lambda header: header[name].update(shape=shape))


@case(
    40,
    "one",
    3,
    "DIR: model.norm.weight: expects dtype BF16, found F16; pass --cast to round it to BF16",
    reads=True,
)
def float16(path: Path) -> None:
    edit_header(path / SHARD, lambda header: header["model.norm.weight"].update(dtype="F16"))


@case(40, "one", 3, "DIR/model.safetensors: *: dtype 'F8_E5M2' has no place in GPT-OSS; expects *")
def float8(path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj_blocks"
    edit_header(path / SHARD, lambda header: header[name].update(dtype="F8_E5M2"))


@case(41, "one", 4, "DIR: * unknown tensors: *")
def one_layer_in_bf16(path: Path) -> None:
    name = "model.layers.0.mlp.experts.down_proj"
    shape = header_of(path / SHARD)[0][name + "_blocks"]["shape"]
    drop(path / SHARD, name + "_blocks", name + "_scales")
    header, rest = header_of(path / SHARD)
    length = 8 * 224 * shape[2] * 32 * 2
    place = [len(rest), len(rest) + length]
    header[name] = {"dtype": "BF16", "shape": [8, shape[2] * 32, 224], "data_offsets": place}
    write_header(path / SHARD, header, rest + b"\x01\x3c" * (length // 2))


@case(42, "one", 3, "DIR/config.json: model_type 'llama'; supported: 'gpt_oss'")
def llama(path: Path) -> None:
    edit_config(path, model_type="llama", architectures=["LlamaForCausalLM"])


@case(42, "openai", 3, "DIR: OpenAI's names beside Hugging Face's config.json; put OpenAI's own *")
def config_of_the_other_layout(path: Path) -> None:
    shutil.copy(path.parent / "starts" / "one" / "config.json", path)


@case(45, "one", 3, "DIR: *: layout * expects shape *, found *")
def config_of_another_hidden_size(path: Path) -> None:
    edit_config(path, hidden_size=256)


@case(45, "one", 4, "DIR: * tensors missing: model.layers.1.*")
def config_of_more_layers(path: Path) -> None:
    edit_config(path, num_hidden_layers=2, layer_types=["sliding_attention", "full_attention"])


@case(
    45,
    "one",
    3,
    "DIR/config.json: num_attention_heads is 15, expects a multiple of num_key_value_heads, 4",
)
def config_of_odd_heads(path: Path) -> None:
    edit_config(path, num_key_value_heads=4)


@case(45, "one", 3, "DIR: *: layout * expects shape *, found *")
def config_of_more_experts(path: Path) -> None:
    edit_config(path, num_local_experts=16)


@case(45, "one", 3, "DIR/config.json: vocab_size is 300, * have 288 rows: *--vocab-size 288")
def config_of_another_vocabulary(path: Path) -> None:
    edit_config(path, vocab_size=300)


@case(45, "one", 3, "DIR/config.json: num_experts_per_tok is 9, expects at most *, 8")
def config_of_more_experts_a_token(path: Path) -> None:
    edit_config(path, num_experts_per_tok=9, experts_per_token=9)


@case(
    46,
    "one",
    4,
    "DIR: sliding_window is missing: taken as 128, as transformers does (--strict)",
    "--strict",
)
def config_without_window(path: Path) -> None:
    edit_json(path / "config.json", lambda content: content.pop("sliding_window"))


@case(
    46,
    "one",
    4,
    "DIR: layer_types is missing: taken as alternating, sliding first* (--strict)",
    "--strict",
)
def config_without_layer_types(path: Path) -> None:
    edit_json(path / "config.json", lambda content: content.pop("layer_types"))


@case(46, "one", 3, "DIR/config.json: layer_types do not alternate *")
def config_with_other_layer_types(path: Path) -> None:
    edit_config(path, layer_types=["full_attention"])


@case(47, "one", 3, "DIR/config.json: rope_parameters.factor is 16.0, rope_scaling has 32.0")
def config_with_two_ropes(path: Path) -> None:
    edit_json(path / "config.json", lambda content: content["rope_parameters"].update(factor=16.0))


@case(47, "one", 3, "DIR/config.json: rope_type is 'linear', GPT-OSS has 'yarn'")
def config_with_another_rope(path: Path) -> None:
    def edit(content: dict[str, Any]) -> None:
        content["rope_parameters"]["rope_type"] = content["rope_scaling"]["rope_type"] = "linear"

    edit_json(path / "config.json", edit)


@case(50, "one", 4, "DIR: 1 tensors missing: model.layers.0.self_attn.sinks")
def missing_sinks(path: Path) -> None:
    drop(path / SHARD, "model.layers.0.self_attn.sinks")


@case(50, "one", 4, "DIR: 1 tensors missing: model.layers.0.mlp.router.bias")
def missing_bias(path: Path) -> None:
    drop(path / SHARD, "model.layers.0.mlp.router.bias")


@case(
    51, "one", 4, "DIR: no lm_head.weight: a model without its head, or one that training tied; *"
)
def missing_head(path: Path) -> None:
    drop(path / SHARD, "lm_head.weight")


@case(51, "one", 3, "DIR/config.json: tie_word_embeddings is True, and lm_head.weight is stored: *")
def tied_head(path: Path) -> None:
    edit_config(path, tie_word_embeddings=True)


@case(
    53, "one", 3, "DIR: a LoRA adapter, not a model; name its base as SOURCE, and it as --adapter"
)
def lora_adapter(path: Path) -> None:
    (path / "adapter_config.json").write_text("{}")


@case(
    54,
    "one",
    3,
    "DIR/config.json: quantised with 'bitsandbytes', and no tensor is stored as that stores them",
)
def bitsandbytes(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": "bitsandbytes"})
    drop(path / SHARD, "model.layers.0.mlp.router.bias")


@case(54, "one", 3, "DIR/config.json: quantization_config is 'mxfp4', expects an object")
def quantisation_of_text(path: Path) -> None:
    edit_config(path, quantization_config="mxfp4")


# Megatron; more in test_torch_dist_hostile.py


@case(1, "megatron", 4, "DIR/iter_*/.metadata: a Git LFS pointer, not weights (expects 9 bytes)*")
def lfs_pointer_as_metadata(path: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:16d0\nsize 9\n"
    (iteration(path) / ".metadata").write_text(text)


@case(2, "megatron", 4, "DIR/iter_*.distcp: looks like an HTML page, not torch_dist; *")
def html_page_as_distcp(path: Path) -> None:
    next(iteration(path).glob("*.distcp")).write_text("<html><title>429</title></html>")


@case(2, "megatron", 4, "DIR/iter_*/run_config.yaml: looks like an HTML page; download it again")
def html_page_as_run_config(path: Path) -> None:
    _run_config(path, "<html><title>429</title></html>")


@case(37, "megatron", 4, "DIR/iter_*/.metadata: no pickle: damaged, or another file")
def metadata_of_zeros(path: Path) -> None:
    (iteration(path) / ".metadata").write_bytes(bytes(4096))


@case(3, "megatron", 4, "DIR/latest_checkpointed_iteration.txt: empty file")
def empty_tracker(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_text("")


@case(8, "megatron", 4, "DIR/iter_*/common.pt: a compressed archive, not a torch.save file; *")
def gzip_as_common_state(path: Path) -> None:
    (iteration(path) / "common.pt").write_bytes(gzip.compress(b"common"))


@case(54, "one", 3, "DIR/config.json: quantised with *fp8*, which is not known here; *")
def quantisation_of_a_list(path: Path) -> None:
    edit_config(path, quantization_config={"quant_method": ["fp8"]})
    drop(path / SHARD, "model.layers.0.mlp.router.bias")


@case(59, "megatron", 4, "DIR/iter_*: * files missing: *.distcp")
def missing_distcp(path: Path) -> None:
    for file in iteration(path).glob("*.distcp"):
        file.unlink()


@case(61, "megatron", 4, "DIR/iter_*/mp_rank_00/model_optim_rng.pt: empty file")
def legacy_torch(path: Path) -> None:
    (iteration(path) / "mp_rank_00").mkdir()
    (iteration(path) / "mp_rank_00" / "model_optim_rng.pt").write_bytes(b"")


@case(61, "megatron", 3, "DIR/iter_*/metadata.json: format 'zarr'; supported: torch_dist")
def zarr(path: Path) -> None:
    edit_json(iteration(path) / "metadata.json", lambda c: c.update(sharded_backend="zarr"))


@case(
    62,
    "megatron",
    2,
    "DIR/latest_checkpointed_iteration.txt: names iter_0000009, which is missing; choose "
    "--iteration 1",
)
def tracker_dangles(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_text("9")


@case(
    62,
    "megatron",
    3,
    "DIR/latest_checkpointed_iteration.txt: expected an iteration, found '../../x'",
)
def tracker_climbs_out(path: Path) -> None:
    (path / "latest_checkpointed_iteration.txt").write_text("../../x")


@case(
    62,
    "megatron",
    3,
    "DIR/latest_checkpointed_iteration.txt: links to */secret, outside the checkpoint; pass *",
)
def tracker_links_out(path: Path) -> None:
    (path.parent / "secret").write_text("1")
    (path / "latest_checkpointed_iteration.txt").unlink()
    (path / "latest_checkpointed_iteration.txt").symlink_to(path.parent / "secret")


@case(61, "megatron", 3, "DIR/iter_*/metadata.json: format 'xxx*x; supported: torch_dist")
def format_of_a_long_name(path: Path) -> None:
    edit_json(iteration(path) / "metadata.json", lambda c: c.update(sharded_backend="x" * 5000))


@case(61, "megatron", 4, "DIR/iter_*/metadata.json: not JSON: *")
def format_of_a_huge_number(path: Path) -> None:
    (iteration(path) / "metadata.json").write_text('{"sharded_backend": ' + "9" * 5000 + "}")


@case(
    58,
    "megatron",
    3,
    "DIR/iter_*/.metadata: *: storage path 'xxx*' leaves the checkpoint directory",
)
def storage_path_of_300_bytes(path: Path) -> None:
    file = iteration(path) / ".metadata"
    short, long = b"X\x0c\0\0\0__0_0.distcp", b"X" + (300).to_bytes(4, "little") + b"x" * 300
    text = file.read_bytes()
    assert text.count(short) == 1
    file.write_bytes(text.replace(short, long))


def _run_config(path: Path, text: str) -> None:
    (iteration(path) / "run_config.yaml").write_text(text)


@case(55, "megatron", 3, "DIR/iter_*/run_config.yaml: could not determine *os.mkdir'; not executed")
def yaml_that_calls(path: Path) -> None:
    _run_config(path, "model:\n  a: !!python/object/apply:os.mkdir [canary]\n")


@case(56, "megatron", 3, "DIR/iter_*/run_config.yaml: nested too deep, or expands to too many *")
def yaml_whose_aliases_multiply(path: Path) -> None:
    lines = ["a0: &a0 [x]", *(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]" for n in range(1, 9))]
    _run_config(path, "\n".join([*lines, "model: {num_layers: *a8}"]))


@case(56, "megatron", 3, "DIR/iter_*/run_config.yaml: nested too deep, or expands to too many *")
def yaml_that_holds_itself(path: Path) -> None:
    _run_config(path, "model: &a {num_layers: *a}")


@case(56, "megatron", 3, "DIR/iter_*/run_config.yaml: merge keys ('<<') are not read")
def yaml_that_merges(path: Path) -> None:
    _run_config(path, "a: &a {x: 1}\nmodel: {<<: [*a, *a]}")


@case(56, "megatron", 4, "DIR/iter_*/run_config.yaml: not YAML: month must be in 1..12")
def yaml_of_no_date(path: Path) -> None:
    _run_config(path, "model: {num_layers: 2026-99-01}")


@case(56, "megatron", 4, "DIR/iter_*/run_config.yaml: key 'num_layers' appears twice")
def yaml_that_says_it_twice(path: Path) -> None:
    _run_config(path, "model: {num_layers: 1, num_layers: 2}")


@case(67, "megatron", 4, "DIR/iter_*: no .metadata: an unfinished (perhaps asynchronous) save")
def unfinished_save(path: Path) -> None:
    (iteration(path) / ".metadata").unlink()


def iteration(path: Path) -> Path:
    return next(iter(path.glob("iter_*")))


# The tool's own files


@case(93, "one", 3, "DIR/gptoss-convert.json: schema 0, this version reads 1")
def manifest_of_another_schema(path: Path) -> None:
    (path / "gptoss-convert.json").write_text('{"schema": 0}')

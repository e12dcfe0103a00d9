"""Which tensor goes to which file, and what the sidecar remembers of the files before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptoss_convert.containers import safetensors
from gptoss_convert.errors import GptossError, IntegrityError
from gptoss_convert.formats import hf, openai, shards, sidecar
from gptoss_convert.formats.sidecar import FOLDER, ORIGIN, SCALES, Origin
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table

SIZES = load_model().sizes(
    {
        "num_hidden_layers": 3,
        "num_local_experts": 4,
        "vocab_size": 50,
        "hidden_size": 64,
        "intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }
)
TENSORS = list(load_table("hf").tensors("mxfp4", SIZES))
INDEX = safetensors.INDEX


def names_in(text: str) -> list[str]:
    return [name for name in json.loads(text) if name != "__metadata__"]


@pytest.mark.parametrize("limit", [1, 3_000, 20_000, 50_000, 1 << 40])
def test_shards_hold_every_tensor_once_and_keep_to_the_limit(limit: int):
    headers = shards.by_size(hf.STYLE, TENSORS, limit)
    found = [name for text in headers.values() for name in names_in(text)]
    assert sorted(found) == sorted(t.name for t in TENSORS)
    sizes = {spec.name: spec.nbytes for spec in shards.specs_of(TENSORS)}
    for text in headers.values():
        names = names_in(text)
        pair = {name.removesuffix("_blocks").removesuffix("_scales") for name in names}
        assert sum(sizes[n] for n in names) <= limit or len(pair) == 1
        for name in names:
            assert not name.endswith("_blocks") or name.replace("blocks", "scales") in names
    if limit == 1 << 40:
        assert [*headers] == ["model.safetensors"]


def test_file_names_count_from_one_with_openais_double_dash():
    for style, dash in ((hf.STYLE, "-"), (openai.STYLE, "--")):
        variant = list(load_table(style.format).tensors("mxfp4", SIZES))
        headers = shards.by_size(style, variant, 50_000)
        count = len(headers)
        assert count > 1
        assert [*headers] == [
            f"model{dash}{n:05d}-of-{count:05d}.safetensors" for n in range(1, count + 1)
        ]


def test_an_index_names_the_file_of_every_tensor():
    headers = shards.by_size(hf.STYLE, TENSORS, 50_000)
    index = json.loads(shards.index_json(headers, "\n", None) or b"")
    assert index["weight_map"] == {
        name: file for file, text in headers.items() for name in names_in(text)
    }
    total = sum(spec.nbytes for spec in shards.specs_of(TENSORS))
    assert index["metadata"]["total_size"] == total
    assert shards.index_json(shards.by_size(hf.STYLE, TENSORS, 1 << 40), "hf", None) is None


def origin(headers: dict[str, str], index: str | None = None, format: str = "hf") -> Origin:
    return Origin(format, headers, index, None)


def test_remembered_headers_come_back_if_they_hold_these_tensors():
    headers = shards.by_size(hf.STYLE, TENSORS, 50_000)
    assert shards.restored("hf", TENSORS, origin(headers)) == headers
    assert shards.restored("hf", TENSORS, None) is None
    assert shards.restored("openai", TENSORS, origin(headers)) is None
    assert shards.restored("hf", TENSORS[1:], origin(headers)) is None
    first = next(iter(headers))
    assert shards.restored("hf", TENSORS, origin({**headers, "x": headers[first]})) is None
    assert shards.restored("hf", TENSORS, origin({**headers, first: "{"})) is None
    empty = '{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    assert shards.restored("hf", TENSORS, origin({**headers, "x": empty})) is None
    assert shards.restored("hf", TENSORS, origin({**headers, first: '{"a":{"shape":[1]}}'})) is None


def test_a_remembered_index_comes_back_if_it_names_the_same_files():
    headers = shards.by_size(hf.STYLE, TENSORS, 50_000)
    made = shards.index_json(headers, "\n", None) or b""
    content = json.loads(made) | {"metadata": {"total_size": 1, "total_parameters": 2}}
    before = json.dumps(content, indent=5)
    assert shards.index_json(headers, "\n", origin(headers, before)) == before.encode()
    content["weight_map"] = dict.fromkeys(content["weight_map"], "elsewhere.safetensors")
    other = origin(headers, json.dumps(content))
    assert shards.index_json(headers, "\n", other) == made
    with pytest.raises(IntegrityError, match=rf"{FOLDER}/{ORIGIN}: index: not JSON"):
        shards.index_json(headers, "\n", origin(headers, "{"))


def write_sidecar(root: Path, content: object) -> None:
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    image = sidecar.image(SIZES, None)
    raw = bytearray(image.files[0].size)
    for offset, part in image.files[0].fixed:
        raw[offset : offset + len(part)] = part
    (root / FOLDER / SCALES).write_bytes(bytes(raw))
    if content is not None:
        (root / FOLDER / ORIGIN).write_text(json.dumps(content))


GOOD: dict[str, Any] = {
    "schema": 1,
    "format": "hf",
    "headers": {"a.safetensors": "{}"},
    "index": None,
    "config": "{}",
}


def test_a_sidecar_is_read_with_or_without_its_origin(tmp_path: Path):
    assert sidecar.read(tmp_path) is None
    write_sidecar(tmp_path, None)
    found = sidecar.read(tmp_path)
    assert found is not None
    assert found.origin is None
    assert {chunk.tensor for chunk in found.chunks} == {
        f"layers.{n}.{weight}.scales" for n in range(3) for weight in ("gate_up", "down")
    }
    kept = Origin("hf", {"a.safetensors": "{}"}, "index", "config")
    write_sidecar(tmp_path, json.loads(kept.to_json()))
    found = sidecar.read(tmp_path)
    assert found is not None
    assert found.origin == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2, expects 1"),
        ({"headers": []}, "headers, index or config is missing or malformed"),
        ({"index": 1}, "headers, index or config is missing or malformed"),
        ({"headers": {"../a.safetensors": "{}"}}, "'../a.safetensors' is not acceptable"),
        ({"headers": {"config.json": "{}"}}, "'config.json' is not acceptable"),
        ({"headers": {"a.safetensors": 1}}, "'a.safetensors' is not acceptable"),
        ({"config": "\ud800"}, "headers, index or config is not Unicode text"),
    ],
)
def test_a_bad_origin_is_refused(tmp_path: Path, change: dict[str, object], message: str):
    write_sidecar(tmp_path, GOOD | change)
    with pytest.raises(IntegrityError) as refused:
        sidecar.read(tmp_path)
    assert str(refused.value).startswith(f"{tmp_path / FOLDER / ORIGIN}: ")
    assert str(refused.value).endswith(message)


def test_scales_of_another_shape_are_refused(tmp_path: Path):
    write_sidecar(tmp_path, GOOD)
    path = tmp_path / FOLDER / SCALES
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(GptossError, match=r"scales.safetensors: truncated"):
        sidecar.read(tmp_path)

"""Each parser of what others wrote stops at its budget, in seconds and in little memory."""

from __future__ import annotations

import json
import pickle
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest

from gptoss_convert.containers import (
    budget,
    plain_yaml,
    safetensors,
    sharded_safetensors,
    strict_json,
    torch_saves,
)
from gptoss_convert.containers.budget import Budget, json_parts, yaml_parts
from gptoss_convert.containers.plain_yaml import parse_yaml
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.containers.torch_dist import pickle_state, pickles
from gptoss_convert.containers.torch_dist.stand_ins import COMMON, METADATA
from gptoss_convert.errors import GptossError, InputError, IntegrityError
from gptoss_convert.formats.config.numbers import MOST_EXPERTS
from gptoss_convert.synth.synth import MODELS

PART_BYTES = 400
"""What a part may take while it is parsed; what stays of it is a quarter of that."""


def cost(act: Callable[[], object]) -> tuple[int, float]:
    """(bytes that it takes at most, seconds), whether or not it is refused."""
    tracemalloc.start()
    began = time.process_time()
    try:
        act()
    except GptossError:
        pass
    finally:
        spent, peak = time.process_time() - began, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak, spent


JSON = {
    "zeros": lambda n: '{"a":[' + ",".join("0" * n) + "]}",
    "floats": lambda n: '{"a":[' + ",".join(["1.5e3"] * n) + "]}",
    "texts": lambda n: '{"a":[' + ",".join(f'"{i:06}"' for i in range(n)) + "]}",
    "keys": lambda n: "{" + ",".join(f'"{i}":0' for i in range(n // 2)) + "}",
    "lists": lambda n: '{"a":[' + ",".join(["[]"] * (n // 2)) + "]}",
    "objects": lambda n: '{"a":[' + ",".join(['{"b":{}}'] * (n // 4)) + "]}",
    "nested": lambda n: '{"a":' + "[" * n + "]" * n + "}",
    "opened": lambda n: '{"a":' + "[" * n,
}


@pytest.mark.parametrize("form", JSON)
def test_json_stops_at_its_budget(form: str) -> None:
    few = Budget(1 << 20, 20_000)
    below, above = JSON[form](few.parts // 2), JSON[form](4 * few.parts)
    assert json_parts(below) <= few.parts < json_parts(above)
    peak, seconds = cost(lambda: parse_object("x", below, few))
    assert peak < PART_BYTES * few.parts and seconds < 2
    with pytest.raises(InputError, match=r"^x: .* values, at most 20000 are read$"):
        parse_object("x", above, few)
    assert cost(lambda: parse_object("x", above, few))[0] < 20_000


YAML = {
    "lines": lambda n: "\n".join(f"k{i}: 0" for i in range(n // 2)),
    "list": lambda n: "[" + ", ".join("0" * n) + "]",
    "items": lambda n: "- 0\n" * (n // 2),
    "nested": lambda n: "[" * n,
    "dashes": lambda n: "- " * n,
    "mappings": lambda n: "? " * n,
    "anchors": lambda n: "".join(f"- &a{i} 0\n" for i in range(n // 4)),
    "quoted": lambda n: "- '\n" * (n // 2),
    "numbers as keys": lambda n: "\n".join(f"{i * 7919}: 0" for i in range(n // 2)),
}


@pytest.mark.parametrize("form", YAML)
def test_yaml_stops_at_its_budget(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = replace(budget.YAML, parts=2_000)
    monkeypatch.setattr(plain_yaml, "YAML", few)
    below, above = YAML[form](few.parts // 2), YAML[form](4 * few.parts)
    assert yaml_parts(below) <= few.parts < yaml_parts(above)
    peak, seconds = cost(lambda: parse_yaml("x", below))
    assert peak < 10 * PART_BYTES * few.parts and seconds < 3
    with pytest.raises(InputError, match=r"^x: .* values, at most 2000 are read$"):
        parse_yaml("x", above)


@pytest.mark.parametrize("text", ["0x" + "F" * 5000, "0b" + "1" * 20000, "-0x" + "F" * 5000])
def test_numbers_that_python_does_not_print_are_refused(text: str) -> None:
    for form in (f"a: {text}", f"a: [{text}]", f"a: {{b: {text}}}", text):
        with pytest.raises(InputError, match="x: a number of too many digits"):
            parse_yaml("x", form)
    assert parse_yaml("x", "a: 0xFFFFFFFFFFFFFFFF") == {"a": (1 << 64) - 1}


def test_the_genuine_configuration_is_far_below() -> None:
    text = "\n".join(f"  some_field_{i}: [1, 2]" for i in range(600))
    assert yaml_parts(text) < budget.YAML.parts / 4 and len(text) < budget.YAML.nbytes / 8


HASHED_ALIKE = [i * ((1 << 61) - 1) for i in range(1, 4000)]
"""Python's hash of each of these is 0."""


def test_keys_of_one_hash_are_refused_before_they_take_quadratic_time() -> None:
    assert {hash(key) for key in HASHED_ALIKE} == {0}
    text = "\n".join(f"{key}: 0" for key in HASHED_ALIKE)
    with pytest.raises(InputError, match="too many digits"):
        parse_yaml("x", text)
    for keys in (HASHED_ALIKE, [(key, 0) for key in HASHED_ALIKE], [float(1 << 61)]):
        for content in (dict.fromkeys(keys), set(keys)):
            with pytest.raises(InputError, match="60 bits as a key"):
                pickles.load(pickle.dumps(content, protocol=4), COMMON, "x", open=True)


PICKLES = {
    "lists": b"]",
    "dicts": b"}",
    "sets": b"\x8f",
    "strings": b"\x8c\x02ab",
    "bytes": b"C\x02ab",
    "tuples": b"K\x01\x85",
    "remembered": b"]\x94",
    "numbers": b"M\xff\xff",
    "nothing": b"N",
    "marks": b"(0",
}


@pytest.mark.parametrize("form", PICKLES)
def test_pickles_stop_at_their_budget(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    few = Budget(budget.PICKLE.nbytes, 40_000)
    monkeypatch.setattr(pickles, "PICKLE", few)
    monkeypatch.setattr(pickle_state, "MAX_OBJECTS", few.parts // 4)
    pickled = b"\x80\x04" + PICKLES[form] * 60_000 + b"."
    with pytest.raises(InputError, match=r"operations|objects"):
        pickles.load(pickled, METADATA, "x")
    peak, seconds = cost(lambda: pickles.load(pickled, METADATA, "x"))
    assert peak < 100 * few.parts and seconds < 2


def shard(path: Path, names: list[str], padding: int = 0) -> None:
    header = {
        name: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}
        for i, name in enumerate(names)
    }
    text = json.dumps(header).encode() + b" " * padding
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(len(names)))


def test_one_header_under_many_names_is_held_once(tmp_path: Path) -> None:
    shard(tmp_path / "0.safetensors", ["a", "b"], 300_000)
    for n in range(1, 200):
        (tmp_path / f"{n:03}.safetensors").symlink_to("0.safetensors")
    with pytest.raises(IntegrityError, match=r"stored in 0.* and again in 001"):
        safetensors.read_directory(tmp_path)
    assert cost(lambda: safetensors.read_directory(tmp_path))[0] < 5_000_000


def test_the_headers_of_all_shards_share_one_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(10):
        shard(tmp_path / f"{n}.safetensors", [f"a{n}"], 30_000)
    safetensors.read_directory(tmp_path)
    monkeypatch.setattr(safetensors, "MAX_HEADER", 100_000)
    with pytest.raises(IntegrityError, match="beside those of the other shards"):
        safetensors.read_directory(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(safetensors, "MAX_TENSORS", 5)
    with pytest.raises(InputError, match="6 tensors and more, at most 5"):
        safetensors.read_directory(tmp_path)


def test_experts_of_all_layers_are_counted() -> None:
    """Each may have names of its own: a thousand layers of a thousand take minutes to list."""
    most = replace(MODELS["120b"], num_hidden_layers=512, num_local_experts=MOST_EXPERTS // 512)
    with pytest.raises(InputError, match="times num_local_experts is 16416, expects at most 16384"):
        replace(most, num_hidden_layers=513)


def test_a_text_is_counted_before_it_is_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    def parsed(*words: object, **more: object) -> object:
        raise AssertionError("parsed")

    monkeypatch.setattr(strict_json.json, "loads", parsed)
    with pytest.raises(InputError):
        parse_object("x", '{"a":' + "[" * 10, Budget(100, 5))


def shards_under_many_names(root: Path) -> None:
    header = {"__metadata__": {"DCP_SHARDING_INFO": "{}"}}
    text = json.dumps(header).ljust(1000).encode()
    first = root / "shard-00001-model-00001-of-00009.safetensors"
    first.write_bytes(len(text).to_bytes(8, "little") + text)
    for rank in range(2, 10):
        (root / f"shard-{rank:05d}-model-00001-of-00009.safetensors").symlink_to(first.name)


def test_shards_of_ranks_share_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards_under_many_names(tmp_path)
    assert sharded_safetensors.read_shards(tmp_path) == ()
    monkeypatch.setattr(sharded_safetensors, "MAX_HEADER", 5000)
    with pytest.raises(IntegrityError, match=r"00006-model.*: header of 1000 bytes, at most 0"):
        sharded_safetensors.read_shards(tmp_path)


def test_files_of_ranks_share_one_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    names = [f"model_world_size_9_rank_{rank}.pt" for rank in range(9)]
    torch.save({f"t.{n}": torch.zeros(2) for n in range(10)}, tmp_path / names[0])
    for name in names[1:]:
        (tmp_path / name).symlink_to(names[0])
    found = torch_saves.read(tmp_path, names)
    assert (len(found.chunks), found.replicas) == (10, 80)
    with monkeypatch.context() as patched:
        patched.setattr(import_module(torch_saves.merged.__module__), "_MAX_PARTS", 50)
        with pytest.raises(InputError, match="more than 50 parts of tensors"):
            torch_saves.read(tmp_path, names)
    nbytes = next(torch_saves.open_all(tmp_path, names)).nbytes
    monkeypatch.setattr("gptoss_convert.containers.torch_saves.file._MOST_TOGETHER", 3 * nbytes)
    with pytest.raises(InputError, match=r"rank_3.pt: pickles of more than \d+ bytes in all"):
        torch_saves.read(tmp_path, names)

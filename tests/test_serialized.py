"""What stands in an iteration directory beside data, against torch's own classes and pickles."""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from enum import Enum, StrEnum
from itertools import count
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.filesystem import (
    _StorageInfo,  # pyright: ignore[reportPrivateUsage]  # part of the on-disk format
)
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from gptoss_convert.containers import TensorSpec
from gptoss_convert.containers.torch_dist import emit, extra_state_objects, serialized, writer
from gptoss_convert.containers.torch_dist.item_form import item_form
from gptoss_convert.containers.torch_dist.metadata import ChunkBox, Item, parse
from gptoss_convert.formats import shards
from gptoss_convert.formats.config import from_hf
from gptoss_convert.formats.megatron.state import common_state
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table
from tests.test_golden import published_config
from tests.torch_dist_files import DTYPES, load_common

Stored = Sequence[tuple[TensorSpec, ChunkBox, Item]]
LARGE = 1 << 40


def torchs_metadata(stored: Stored, objects: Mapping[str, Item]) -> Metadata:
    """What torch's own classes hold of the same tensors and objects."""
    declared: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for spec, box, item in stored:
        entry = declared.setdefault(
            spec.name,
            TensorStorageMetadata(
                TensorProperties(dtype=DTYPES[spec.dtype]), torch.Size(spec.shape), []
            ),
        )
        assert isinstance(entry, TensorStorageMetadata)
        start = torch.Size(box.start)
        entry.chunks.append(ChunkStorageMetadata(start, torch.Size(box.extent)))
        storage[MetadataIndex(spec.name, start)] = _StorageInfo(item.file, item.offset, item.length)
    for name, item in objects.items():
        declared[name] = BytesStorageMetadata()
        storage[MetadataIndex(name)] = _StorageInfo(item.file, item.offset, item.length)
    return Metadata(declared, None, storage, StorageMeta(), "1.0.0")


def pickled_by_torch(content: Metadata) -> Metadata:
    """As it is read from a file that torch wrote: pickling orders some fields anew."""
    return pickle.loads(pickle.dumps(content, protocol=4))


def require_same(ours: object, theirs: object, where: str = "metadata") -> None:
    """The same types, the same fields in the same order, the same values, all the way down."""
    assert type(ours) is type(theirs), where
    if isinstance(ours, dict) and isinstance(theirs, dict):
        require_same(list(ours), list(theirs), f"{where} keys")
        require_same(list(ours.values()), list(theirs.values()), f"{where} values")
    elif isinstance(ours, list | tuple) and isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            require_same(*pair, f"{where}[{number}]")
    elif is_dataclass(ours) and not isinstance(ours, Enum):
        require_same(vars(ours), vars(theirs), f"{where} {type(ours).__name__}")
    else:
        assert ours == theirs, where


def stored_tensors(specs: Sequence[TensorSpec], step: int) -> Stored:
    """The boxes of the specs, each in an item `step` bytes after the one before."""
    boxes = enumerate(writer._boxes(specs))
    return [
        (spec, box, Item(f"__0_{n // 100}.distcp", n * step, form.length))
        for n, (spec, box, form) in boxes
    ]


def of_20b(variant: str) -> tuple[Stored, dict[str, Item]]:
    sizes = load_model().sizes(from_hf("config.json", published_config("20b")).numbers)
    table = load_table("megatron")
    stored = stored_tensors(shards.specs_of(table.tensors(variant, sizes)), 10_000_000)
    names = table.object_names(variant, sizes)
    return stored, {name: Item("__0_9.distcp", 700 * n, 652) for n, name in enumerate(names)}


SMALL = [
    TensorSpec("experts", "BF16", (4, 6, 10), (1, 3, 10)),
    TensorSpec("ragged", "F32", (7,), (3,)),
    TensorSpec("scalar", "F16", ()),
    TensorSpec("codes, with ünicode", "U8", (300, 3000), (300, 1)),
    # Names of fields are strings of the same pickle.
    TensorSpec("offset", "F32", (1, 2, 3, 4, 5)),
]


def test_small_metadata_is_what_torchs_classes_hold() -> None:
    stored = stored_tensors(SMALL[:3] + SMALL[4:], LARGE)
    objects = {"fqn": Item("__0_1.distcp", 0, 5), "x._extra_state/shard_0_1": Item("b", 1 << 31, 1)}
    ours = pickle.loads(serialized.metadata(stored, objects))
    theirs = torchs_metadata(stored, objects)
    assert ours == theirs
    require_same(ours, pickled_by_torch(theirs))


def test_metadata_of_nothing_and_of_more_than_one_batch() -> None:
    for stored in ([], stored_tensors(SMALL[3:4], 1)):
        ours = pickle.loads(serialized.metadata(stored, {}))
        require_same(ours, pickled_by_torch(torchs_metadata(stored, {})))


@pytest.mark.parametrize("variant", ["stacked-both", "per-layer", "per-expert"])
def test_metadata_of_20b_is_what_torchs_classes_hold_and_no_longer(variant: str) -> None:
    stored, objects = of_20b(variant)
    assert len(stored) > 4000
    pickled, witness = serialized.metadata(stored, objects), torchs_metadata(stored, objects)
    require_same(pickle.loads(pickled), pickled_by_torch(witness))
    assert len(pickled) <= len(pickle.dumps(witness, protocol=4))


def test_metadata_has_tensor_properties_as_torch_makes_them() -> None:
    """The fields that torch encodes: they are objects again, and only dtype differs from default"""
    stored = stored_tensors(SMALL[:1], 1)
    found = pickle.loads(serialized.metadata(stored, {})).state_dict_metadata["experts"].properties
    assert vars(found) == vars(TensorProperties(dtype=torch.bfloat16))
    assert found.memory_format is torch.contiguous_format and found.layout is torch.strided


def test_our_reader_and_torchs_pickler_agree_on_the_metadata() -> None:
    """What torch pickles of the same content is read as the same tensors, boxes and items."""
    stored, objects = of_20b("stacked")
    theirs = pickle.dumps(torchs_metadata(stored, objects), protocol=4)
    assert parse(serialized.metadata(stored, objects), "ours") == parse(theirs, "theirs")


def test_metadata_uses_opcodes_of_protocol_2_alone() -> None:
    pickled = serialized.metadata(stored_tensors(SMALL, LARGE), {})
    assert max(op.proto for op, _, _ in pickletools.genops(pickled)) == 2
    names = {op.name for op, _, _ in pickletools.genops(pickled)}
    assert {"BINPUT", "BINGET", "LONG_BINPUT", "LONG_BINGET", "LONG1"} <= names


def pickled_in(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as records:
        (name,) = (name for name in records.namelist() if name.endswith("/data.pkl"))
        return records.read(name)


def saved(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def numbers_left_out(pickled: bytes) -> bytes:
    """Python's pickler numbers every value in case it comes again; ours those that may."""
    return pickletools.optimize(pickled)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (3,), (2, 255), (256, 1, 65_536), (1, 1, 2, 3), (70_000,)])
def test_an_item_has_the_opcodes_that_torch_writes(dtype: str, shape: tuple[int, ...]) -> None:
    theirs = pickled_in(saved(torch.zeros(shape, dtype=DTYPES[dtype])))
    form = item_form(dtype, shape)
    ours = pickled_in(form.prefix + bytes(form.nbytes) + form.suffix)
    assert ours == numbers_left_out(theirs)


def test_extra_state_is_one_empty_uint8_tensor_with_the_opcodes_that_torch_writes() -> None:
    objects = extra_state_objects(["a", "b"])
    assert list(objects) == ["a", "b"] and objects["a"] is objects["b"]
    (found,) = torch.load(io.BytesIO(objects["a"]), weights_only=True)
    assert (found.dtype, found.shape) == (torch.uint8, (0,))
    theirs = saved([torch.empty(0, dtype=torch.uint8)])
    assert pickled_in(objects["a"]) == numbers_left_out(pickled_in(theirs))
    with zipfile.ZipFile(io.BytesIO(objects["a"])) as records:
        assert records.testzip() is None


@pytest.mark.parametrize("layout", ["stacked", "per-layer"])
def test_common_state_is_what_torch_saves_byte_for_byte(layout: str) -> None:
    state = common_state(from_hf("config.json", published_config("20b")), layout)
    ours = serialized.common(state)
    assert pickled_in(ours) == pickled_in(saved(state))
    require_same(load_common(ours), state)
    with zipfile.ZipFile(io.BytesIO(ours)) as records:
        assert records.testzip() is None


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=5)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | text
values = st.recursive(
    scalars,
    lambda some: (
        st.lists(some, max_size=4)
        | st.lists(some, max_size=4).map(tuple)
        | st.dictionaries(text | st.integers(), some, max_size=4)
        | st.dictionaries(text, some, max_size=4).map(lambda fields: Namespace(**fields))
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(st.dictionaries(text, values, max_size=5))
def test_any_plain_common_state_is_loaded_as_it_was(state: dict[str, object]) -> None:
    ours = serialized.common(state)
    require_same(load_common(ours), state)
    assert pickled_in(ours) == pickled_in(saved(serialized._plain(state)))


def test_equal_common_states_have_equal_bytes() -> None:
    """Whatever strings and lists happen to be one object."""
    name, shared = "torch dist", ["x"]
    apart = {"a": "".join(list(name)), "b": "".join(list(name)), "c": ["x"], "d": ["x"]}
    joined = {"a": name, "b": name, "c": shared, "d": shared}
    assert serialized.common(apart) == serialized.common(joined)


class Mode(StrEnum):
    FAST = "fast"


@pytest.mark.parametrize(
    "value",
    [b"x", {1}, 1j, np.float64(1), np.int32(1), Mode.FAST, PurePosixPath("x"), torch.bfloat16],
    ids=repr,
)
def test_other_values_in_a_common_state_are_mistakes(value: object) -> None:
    for state in ({"a": value}, {"a": [{"b": (value,)}]}, {"a": Namespace(b=value)}):
        with pytest.raises(TypeError, match="common state: expected plain values, found"):
            serialized.common(state)


EDGES = [0, 255, 256, 65_535, 65_536, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 47]


@pytest.mark.parametrize("value", [*EDGES, 1 << 63, -1, -(1 << 31), -(1 << 31) - 1, -(1 << 40)])
def test_integers_have_the_opcodes_of_pythons_pickler(value: int) -> None:
    assert emit.HEADER + emit.integer(value) + emit.STOP == pickle.dumps(value, protocol=2)


@settings(deadline=None)
@given(st.lists(st.integers(), max_size=6).map(tuple), text)
@example((-(1 << 39), 1 << 39, -(1 << 39) - 1), "")
def test_tuples_and_strings_have_the_opcodes_of_pythons_pickler(
    numbers: tuple[int, ...], word: str
) -> None:
    for ours, value in ((emit.integers(numbers), numbers), (emit.string(word), word)):
        assert emit.HEADER + ours + emit.STOP == numbers_left_out(pickle.dumps(value, protocol=2))


def test_repeated_values_are_numbered_as_by_pythons_pickler() -> None:
    words = tuple(f"word {n}" for n in range(300)) * 2
    shared = emit.Shared(emit.string, count())
    ours = emit.HEADER + emit.sequence(*(shared[word] for word in words)) + emit.STOP
    assert ours == numbers_left_out(pickle.dumps(words, protocol=2))

"""The pickle reader: what genuine pickles hold comes back, and nothing else can be built or run."""

from __future__ import annotations

import enum
import functools
import io
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import MetadataIndex

from gptoss_convert.containers.torch_dist import pickle_state, pickles
from gptoss_convert.containers.torch_dist.pickle_state import Construct, Record
from gptoss_convert.containers.torch_dist.stand_ins import COMMON, METADATA, TENSOR
from gptoss_convert.errors import GptossError, InputError, IntegrityError

SCALARS = (
    st.none() | st.booleans() | st.integers(-(1 << 200), 1 << 200) | st.floats(allow_nan=False)
)
VALUES = st.recursive(
    SCALARS | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text() | st.integers(0, 9), inner)
        | st.sets(st.integers(0, 300))
    ),
    max_leaves=20,
)


@settings(max_examples=150, deadline=None)
@given(VALUES, st.sampled_from([4, 5]))
def test_plain_values_come_back(value: object, protocol: int) -> None:
    assert pickles.load(pickle.dumps(value, protocol=protocol), {}, "p") == value


def test_long_containers_and_shared_parts_come_back() -> None:
    shared = [1, 2]
    value = {"long": list(range(70_000)), "many": {str(n): n for n in range(3000)}, "a": shared}
    value["b"] = shared
    loaded = pickles.load(pickle.dumps(value, protocol=2), {}, "p")
    assert loaded == value
    assert isinstance(loaded, dict) and loaded["a"] is loaded["b"]


def test_known_classes_become_stand_ins() -> None:
    index = MetadataIndex("a.b", torch.Size([1, 2]), 3)
    loaded = pickles.load(pickle.dumps([index, torch.bfloat16]), METADATA, "p")
    assert isinstance(loaded, list)
    record, dtype = loaded
    assert isinstance(record, Record)
    assert record.state == {"fqn": "a.b", "offset": (1, 2), "index": 3}
    assert dtype == "torch.bfloat16"


class Canary:
    """An object whose pickle creates a file when it is executed."""

    def __init__(self, path: Path, how: str) -> None:
        self.path, self.how = path, how

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        if self.how == "exec":
            return exec, (f"open({str(self.path)!r}, 'w').close()",)
        if self.how == "mkdir":
            return os.mkdir, (str(self.path),)
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("vocabulary", [METADATA, COMMON, TENSOR], ids=["meta", "common", "tensor"])
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("how", ["exec", "mkdir", "system"])
def test_a_foreign_global_is_named_and_not_executed(
    tmp_path: Path, how: str, protocol: int, vocabulary: pickle_state.Vocabulary
) -> None:
    canary = tmp_path / "canary"
    hostile = pickle.dumps({"a": [Canary(canary, how)]}, protocol=protocol)
    with pytest.raises(InputError, match=r"^p: pickle refers to \S+; not executed$"):
        pickles.load(hostile, vocabulary, "p")
    loaded = pickles.load(hostile, vocabulary, "p", open=True)
    assert isinstance(loaded, dict) and isinstance(loaded["a"][0], Record)
    assert not canary.exists()
    # The bait is live: Python's own reader does take it.
    pickle.loads(hostile)
    assert canary.exists()


class Kind(enum.Enum):
    SOME = "some"


class Flag(enum.Flag):
    ONE = 1
    TWO = 2


class Items(dict[str, int]):
    """A dict of a trainer's own class."""


class Values(list[int]):
    """A list of a trainer's own class."""


class Slotted:
    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value


class Keywords:
    """An object that its pickle makes with keywords."""

    def __new__(cls, *, given: int) -> Keywords:
        return super().__new__(cls)

    def __getnewargs_ex__(self) -> tuple[tuple[()], dict[str, int]]:
        return (), {"given": 4}


def attributed() -> OrderedDict[str, int]:
    """A dict with attributes of its own, as `Module.state_dict` makes it."""
    made = OrderedDict(a=1)
    made._metadata = 1  # pyright: ignore[reportAttributeAccessIssue]
    return made


OWN = {
    "enum": Kind.SOME,
    "flags": Flag.ONE | Flag.TWO,
    "class": Items,
    "function": attributed,
    "dict": Items(a=1),
    "list": Values([1, 2]),
    "slots": Slotted(3),
    "keywords": Keywords(given=4),
    "partial": functools.partial(max, 5),
    "method": Keywords(given=4).__getnewargs_ex__,
    "by class": {Items: 1, Kind.SOME: 2},
}


@pytest.mark.parametrize("protocol", [2, 4, 5])
@pytest.mark.parametrize("name", OWN)
def test_what_is_of_a_class_nobody_knows_stays_inert_and_hides_nothing_else(
    name: str, protocol: int
) -> None:
    value = {"before": 1, "own": OWN[name], "after": [2, (3, "text")]}
    loaded = pickles.load(pickle.dumps(value, protocol=protocol), {}, "p", open=True)
    assert isinstance(loaded, dict)
    own = loaded.pop("own")
    assert loaded == {"before": 1, "after": [2, (3, "text")]}
    assert isinstance(own, Record | Construct | dict)
    with pytest.raises(InputError):
        pickles.load(pickle.dumps(value, protocol=protocol), {}, "p")


def test_attributes_of_a_dict_are_dropped() -> None:
    value = pickles.load(pickle.dumps([attributed(), 2]), COMMON, "p", open=True)
    assert value == [{"a": 1}, 2]


def call(module: bytes, name: bytes, argument: bytes = b"X\x01\x00\x00\x00a") -> bytes:
    return b"\x80\x02c" + module + b"\n" + name + b"\n" + argument + b"\x85R."


NAMED = b"\x80\x04\x8c\x02os\x8c\x06system\x93"
HOSTILE = {
    "dotted name": (call(b"torch", b"serialization.os.system"), "refers to torch.serialization.os"),
    "module of a known class": (call(b"torch.serialization", b"os"), "refers to torch.serializ"),
    "stack global": (NAMED + b".", "refers to os.system"),
    "stack global of numbers": (b"\x80\x04K\x01K\x02\x93.", "other than strings"),
    "class by text": (b"\x80\x02(S'ls'\nios\nsystem\n.", "opcode 0x53"),
    "instance": (b"\x80\x02(K\x01ios\nsystem\n.", "opcode 0x69"),
    "extension": (b"\x80\x02\x82\x01.", "opcode 0x82"),
    "persistent text": (b"\x80\x02Pabc\n.", "opcode 0x50"),
    "call of a string": (b"\x80\x02X\x02\x00\x00\x00ls)R.", "calls something other"),
    "call of a dtype": (b"\x80\x02ctorch\nbfloat16\n)R.", "calls something other"),
    "call of an instance": (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81)R.",
        "calls something other",
    ),
    "arguments not a tuple": (b"\x80\x02ctorch\nSize\n]R.", "calls something other"),
    "keywords": (
        b"\x80\x04ctorch.distributed.checkpoint.metadata\nMetadata\n)}K\x01K\x02s\x92.",
        "constructs with keywords",
    ),
    "state of a class": (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n}b.",
        "sets the state of something other",
    ),
    "state of a dict": (b"\x80\x02}}b.", "sets the state of something other"),
    "append to a tuple": (b"\x80\x02)K\x01a.", "something other than a list"),
    "append to an instance": (
        b"\x80\x02ctorch.distributed.checkpoint.metadata\nMetadata\n)\x81K\x01a.",
        "something other than a list",
    ),
    "items of a list": (b"\x80\x02]K\x01K\x02s.", "something other than a dict"),
    "odd items": (b"\x80\x02}(K\x01u.", "something other than a dict"),
    "list as a key": (b"\x80\x02}]K\x01s.", "nested or unhashable"),
    "nested tuple as a key": (b"\x80\x02})\x85\x85K\x01s.", "nested or unhashable"),
    "set member": (b"\x80\x04\x8f(]\x90.", "nested or unhashable"),
    "protocol 1": (b"\x80\x01N.", "protocol 1"),
    "protocol 9": (b"\x80\x09N.", "protocol 9"),
    "rest": (b"\x80\x02N.N.", "2 bytes follow"),
    "two values": (b"\x80\x02NN.", "other than one value"),
    "open mark": (b"\x80\x02(N.", "other than one value"),
    "unknown memo": (b"\x80\x02h\x07.", "never stored"),
    "long integer": (b"\x80\x02\x8b\xff\xff\xff\x7f.", "integer of 2147483647 bytes"),
    "negative integer size": (b"\x80\x02\x8b\xff\xff\xff\xff.", "integer of 4294967295 bytes"),
    "deep marks": (b"\x80\x02" + b"(" * 5000 + b".", "deeper than 1000"),
    "size of strings": (
        b"\x80\x02ctorch\nSize\nX\x01\x00\x00\x00a\x85\x85R.",
        "torch.Size from other than",
    ),
    "size of nothing": (b"\x80\x02ctorch\nSize\n)R.", "torch.Size from other than"),
    "long enum": (
        b"\x80\x02ctorch.distributed.checkpoint.planner\nWriteItemType\nX\xc8\x00\x00\x00"
        + b"a" * 200
        + b"\x85R.",
        "short string",
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_pickle_is_refused_in_one_line(name: str) -> None:
    hostile, message = HOSTILE[name]
    with pytest.raises(InputError, match=message) as caught:
        pickles.load(hostile, METADATA, ".metadata")
    assert str(caught.value).startswith(".metadata: ") and "\n" not in str(caught.value)


DAMAGED = {
    "empty": b"",
    "no stop": b"\x80\x04N",
    "string": b"\x80\x02X\xff\x00\x00\x00a.",
    "huge string": b"\x80\x04\x8d" + struct.pack("<Q", 1 << 60) + b"a.",
    "huge bytes": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 63) + b"a.",
    "huge bytearray": b"\x80\x05\x96" + struct.pack("<Q", 1 << 60) + b"a.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 1 << 60) + b"N.",
    "global": b"\x80\x02ctorch",
    "stack": b"\x80\x02\x86.",
    "mark": b"\x80\x02t.",
    "float": b"\x80\x02G\x00\x00",
    "not utf-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "reduce": b"\x80\x02R.",
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_truncated_pickle_is_an_integrity_error(name: str) -> None:
    with pytest.raises(IntegrityError, match=r"^p: ") as caught:
        pickles.load(DAMAGED[name], METADATA, "p")
    assert "\n" not in str(caught.value)


def test_a_truncated_string_says_what_was_announced() -> None:
    with pytest.raises(IntegrityError, match="1152921504606846976 bytes announced, 2 present"):
        pickles.load(DAMAGED["huge string"], METADATA, "p")


def test_every_truncation_of_a_genuine_pickle_is_an_integrity_error() -> None:
    genuine = pickle.dumps([MetadataIndex("a", torch.Size([1])), OrderedDict(a=1), 1.5, "text"])
    for end in range(len(genuine)):
        with pytest.raises(IntegrityError):
            pickles.load(genuine[:end], METADATA, "p")


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_changed_bytes_end_in_a_value_or_in_one_of_our_errors(data: st.DataObject) -> None:
    genuine = bytearray(pickle.dumps([MetadataIndex("a", torch.Size([1])), {"b": (1, 2)}, "text"]))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(genuine) - 1))
        genuine[at] = data.draw(st.integers(0, 255))
    try:
        pickles.load(bytes(genuine), METADATA, "p")
    except GptossError as error:
        assert "\n" not in str(error)


def peak_of(hostile: bytes, message: str) -> int:
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            pickles.load(hostile, COMMON, "p")
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memo_and_object_bombs_stop_at_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickle_state, "MAX_OBJECTS", 1000)
    assert peak_of(b"\x80\x04N" + b"\x94" * 500_000 + b".", "remembers more than 1000") < 1 << 20
    assert peak_of(b"\x80\x04" + b"]" * 500_000 + b".", "more than 1000 objects") < 1 << 20
    assert peak_of(b"\x80\x04N" + b"\x85" * 500_000 + b".", "more than 1000 objects") < 1 << 20


def test_a_far_memo_index_allocates_nothing() -> None:
    far = b"\x80\x02Nr\xff\xff\xff\xff0" + b"j\xfe\xff\xff\xff."
    assert peak_of(far, "memo entry 4294967294") < 1 << 20


def test_shared_parts_are_not_copied() -> None:
    """A stand-in that copied its argument would let six bytes repeat a megabyte."""
    for vocabulary_entry in ("__builtin__.set", "_codecs.encode", "collections.OrderedDict"):
        made = COMMON[vocabulary_entry]
        assert isinstance(made, Construct)
    long = list(range(1000))
    made = COMMON["__builtin__.set"]
    assert isinstance(made, Construct) and made.make((long,)) is long
    text = "a" * 1000
    made = COMMON["_codecs.encode"]
    assert isinstance(made, Construct) and made.make((text, "latin1")) is text


def test_a_pickle_beyond_the_limit_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickles, "MAX_BYTES", 10)
    with pytest.raises(InputError, match="pickle of 11 bytes; at most 10"):
        pickles.load(bytes(11), {}, "p")


def test_every_vocabulary_holds_neutral_values_only() -> None:
    for vocabulary in (METADATA, COMMON, TENSOR):
        for name, value in vocabulary.items():
            assert not callable(value) and not isinstance(value, type), name


def test_what_torch_save_pickles_is_in_the_vocabulary() -> None:
    stream = io.BytesIO()
    torch.save(torch.zeros(2, 3, dtype=torch.bfloat16), stream)
    # The record data.pkl lies first, and its content begins with the protocol.
    raw = stream.getvalue()
    begin = raw.index(b"\x80\x02c")
    pickled = raw[begin : raw.index(b"PK\x07\x08", begin)]
    loaded = pickles.load(pickled, TENSOR, "p")
    assert isinstance(loaded, Record) and loaded.args[2:4] == ((2, 3), (3, 1))

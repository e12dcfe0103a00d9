"""Spoiled files end in one of our errors, or are read: nothing else, and in bounded memory."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gptoss_convert.containers import safetensors
from gptoss_convert.containers.strict_json import parse_object
from gptoss_convert.conversion.plan import Conversion
from gptoss_convert.errors import GptossError
from tests.fuzzing import FILES, JOURNAL, attempt, little_memory, make_starts, spoil

SPOILED = 40
"""Spoiled copies of each file; `python -m tests.fuzzing` makes as many as there is time for."""

quick = settings(
    max_examples=150,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats(allow_nan=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def starts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Conversion]:
    folder = tmp_path_factory.mktemp("fuzz")
    return folder, make_starts(folder)


@pytest.mark.parametrize("name", FILES)
def test_spoiled_files_end_in_an_answer(starts: tuple[Path, Conversion], name: str) -> None:
    folder, stopped = starts
    start, file = FILES[name]
    content = (folder / start / file).read_bytes()
    answers = set()
    for seed in range(SPOILED):
        spoiled = spoil(name, content, random.Random(f"{name} {seed}"))
        with little_memory():
            answers.add(attempt(folder, name, spoiled, stopped))
    # A spoiled journal is cut where the damage begins, and the steps behind are done again.
    assert answers - {"accepted"} or name == JOURNAL, "no spoiled file was noticed"
    assert attempt(folder, name, content, stopped) == "accepted"


entries = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "U8", "F32", "I64", "", "X"]) | json_values,
        "shape": st.lists(st.integers(-2, 1 << 60), max_size=9) | json_values,
        "data_offsets": st.lists(st.integers(-2, 1 << 60), max_size=3) | json_values,
    },
)


@quick
@given(st.dictionaries(st.text(max_size=8), entries | json_values, max_size=4), st.integers(0, 99))
def test_any_header_is_checked(content: dict[str, object], data_bytes: int) -> None:
    raw = json.dumps(content).encode()
    try:
        header = safetensors.parse_header("x", "x", raw, data_bytes)
    except GptossError:
        return
    assert sum(chunk.nbytes for chunk in header.chunks) == data_bytes


@quick
@given(st.binary(max_size=200))
def test_any_bytes_are_no_header_or_a_checked_one(raw: bytes) -> None:
    try:
        safetensors.parse_header("x", "x", raw, 0)
    except GptossError as error:
        assert str(error).startswith("x: ")


@quick
@given(st.text(max_size=100))
def test_any_text_is_no_json_object_or_one(text: str) -> None:
    try:
        assert isinstance(parse_object("x", text), dict)
    except GptossError as error:
        assert str(error).startswith("x: ")

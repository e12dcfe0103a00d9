"""Records come back as they were, and nothing else comes back as a record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from gptoss_convert.codecs.stats import EncodeStats, ScaleStatistics
from gptoss_convert.containers.json_records import from_json, to_json
from gptoss_convert.engine.records import Anomalies, Done, Region


@dataclass(frozen=True)
class Inner:
    name: str
    share: float


@dataclass(frozen=True)
class Outer:
    count: int
    inner: Inner | None
    digest: bytes
    box: tuple[tuple[int, int], ...]
    pair: tuple[str, float]
    by_expert: Mapping[int, Inner]
    kind: Literal["attention", "mlp"]


RECORD = Outer(
    1, Inner("é", 0.1), b"\x00\xff", ((0, 2), (1, 3)), ("a", 1e300), {-1: Inner("", 0.0)}, "mlp"
)


def arrived(record: Any) -> Any:
    return json.loads(json.dumps(to_json(record)))


def test_a_record_comes_back_from_json() -> None:
    for record in (RECORD, Outer(0, None, b"", (), ("", -0.5), {}, "attention")):
        assert from_json(Outer, arrived(record)) == record


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((0, bad) for bad in (True, 1.0, "1", None, 1 << 64, -2, [])),
        *((1, bad) for bad in (["a"], ["a", 1, 2], ["a", "b"], {"name": "a"}, "ab")),
        *((2, bad) for bad in ("0", "zz", 7, None)),
        *((3, bad) for bad in ([[0]], [0, 1], [[0, 1, 2]], [[0, "1"]], "")),
        *((4, bad) for bad in (["a"], ["a", 1], [1.0, "a"])),
        *((5, bad) for bad in ({"1": ["a", 1.0]}, [[1]], [["1", ["a", 1.0]]])),
        *((6, bad) for bad in ("router", None, 0)),
    ],
)
def test_a_field_of_another_type_is_refused(field: int, value: object) -> None:
    plain = arrived(RECORD)
    plain[field] = value
    with pytest.raises(ValueError):
        from_json(Outer, plain)


@pytest.mark.parametrize("plain", [[], None, 7, {}, "record", [1, 2, 3], [0] * 8])
def test_what_is_no_record_is_refused(plain: object) -> None:
    with pytest.raises(ValueError):
        from_json(Outer, plain)


def test_a_finished_step_is_written_as_the_journal_of_schema_4_has_it() -> None:
    region = Region("model.safetensors", 8, 4096, 0xFFFFFFFF)
    stats = EncodeStats(blocks=4, squared_error=0.25, first_inexact=-1)
    anomalies = Anomalies(1, "inf", (3, 5))
    done = Done(7, (region,), None, ScaleStatistics(2, 1, 0, 3, 9), stats, 1, anomalies)
    text = json.dumps(to_json(done), separators=(",", ":"))
    assert text == (
        '[7,[["model.safetensors",8,4096,4294967295]],null,[2,1,0,3,9],'
        '[4,0,0,0,0,0,0,255,0,0.0,0.25,0.0,0,-1,0.0,0.0,0,0],1,[1,"inf",[3,5]]]'
    )
    assert from_json(Done, json.loads(text)) == done

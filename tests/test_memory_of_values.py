"""Whatever the values are, computing with them takes next to nothing beside the buffers of a plan.

numpy tells tracemalloc of its arrays; the compiled loops allocate nothing.
"""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from functools import reduce
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest

from gptoss_convert.codecs.mxfp4 import CODEC, codec, sums
from gptoss_convert.compare.arrays import distance
from gptoss_convert.compare.diagnosis import expert_digests, looks
from gptoss_convert.compare.value_statistics import distances_of
from gptoss_convert.compare.values import _apart
from gptoss_convert.engine import anomalies
from gptoss_convert.engine.fingerprint import axis_weights, examined, packed_fingerprint
from gptoss_convert.engine.steps import Step
from gptoss_convert.errors import CodecError
from gptoss_convert.quantise.rules import RULES

Bits = npt.NDArray[np.uint16]
SHAPE = (2, 1024, 2048)
"""Experts, rows, columns: 8 MB of BF16."""
BOX = tuple((0, length) for length in SHAPE)
MOST = 4_500_000
"""Bytes beside 8 MB of values: pieces of 2^18 elements, in a few forms."""
VALUES: dict[str, int] = {
    "zeros": 0,
    "minus zeros": 0x8000,
    "NaN": 0x7FC0,
    "infinities": 0xFF80,
    "smallest": 1,
    "largest": 0x7F7F,
    "ones": 0x3F80,
}
SCALES = (0, 1, 2, 127, 252, 253, 254, 255)


def taken(act: Callable[[], object]) -> int:
    """The most bytes that it holds at once beside what was there."""
    tracemalloc.start()
    try:
        act()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def step() -> Step:
    family = SimpleNamespace(axes=("expert", "inter", "hidden"), encodings=("mxfp4",), weight="w")
    return cast(
        Step, SimpleNamespace(family=family, box=BOX, lengths=SHAPE, layer=0, layer_axis=-1)
    )


def held(bits: Bits) -> Any:
    """What a step holds, as `anomalies` sees it."""
    extent = SimpleNamespace(
        tensor="w", origin=0, strides=bits.strides, dtype="BF16", file=SimpleNamespace(name="f")
    )
    part = SimpleNamespace(box=BOX, array=bits, extent=extent)
    recipe = SimpleNamespace(has_values=True, measured=None)
    plain = step()
    whole = SimpleNamespace(family=plain.family, box=BOX, recipe=recipe)
    return SimpleNamespace(step=whole, held={"w": [part]})


@pytest.fixture(params=VALUES)
def bits(request: pytest.FixtureRequest) -> Bits:
    return np.full(SHAPE, VALUES[request.param], np.uint16)


@pytest.mark.parametrize("shape", [(2, 3 << 19), (3 << 19, 2), (1, 3 << 19, 1)])
def test_long_rows_take_no_memory(shape: tuple[int, ...]) -> None:
    """Their weights alone would take four times as much as they do; the sum is the same."""
    bits = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape)
    box = tuple((0, length) for length in shape)
    assert taken(lambda: examined(bits, box, shape, -1)) < 6_000_000
    weights = reduce(np.multiply.outer, [axis_weights(axis, n) for axis, n in enumerate(shape)])
    assert examined(bits, box, shape, -1)[0] == int((weights * bits).sum(dtype=np.uint64))


def test_encoded_rows_take_no_memory() -> None:
    shape = (1, 3 << 19)
    box = tuple((0, length) for length in shape)
    blocks = np.full((1, shape[1] // 32, 16), 0x21, np.uint8)
    parts = {"blocks": blocks, "scales": np.full((1, shape[1] // 32), 127, np.uint8)}
    values = np.empty(shape, np.uint16)
    CODEC.decode(parts, values)
    total = packed_fingerprint(CODEC, parts, box, shape, -1)
    assert total == examined(values, box, shape, -1)[0]
    assert taken(lambda: packed_fingerprint(CODEC, parts, box, shape, -1)) < 6_000_000


def test_looking_at_values_takes_no_memory(bits: Bits) -> None:
    other = np.ones(SHAPE, np.uint16)
    acts: dict[str, Callable[[], object]] = {
        "fingerprint": lambda: examined(bits, BOX, SHAPE, -1),
        "anomalies": lambda: anomalies.examine(held(bits), False),
        "distance": lambda: distance(bits, other),
        "distances": lambda: distances_of(step(), bits, other),
        "first and worst": lambda: _apart(step(), bits.reshape(-1), other.reshape(-1)),
        "looks": lambda: looks(step(), bits, other),
        "looks at equal": lambda: looks(step(), bits, bits.copy()),
        "digests": lambda: expert_digests(step(), bits, other),
    }
    found = {name: taken(act) for name, act in acts.items()}
    # A copy of one side is made here.
    found["looks at equal"] -= bits.nbytes
    assert {name: most for name, most in found.items() if most > MOST} == {}


@pytest.mark.parametrize("kernels", ["compiled", "numpy"])
def test_encoding_values_takes_no_memory(
    kernels: str, bits: Bits, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernels == "numpy":
        bits = bits[:1, :128]
        monkeypatch.setattr("gptoss_convert.codecs.mxfp4.library.load", lambda: None)
    *rows, columns = bits.shape
    blocks = np.empty((*rows, columns // 32, 16), np.uint8)
    scales = np.empty((*rows, columns // 32), np.uint8)
    hints = np.full(scales.shape, 200, np.uint8)
    assert taken(lambda: codec.encode(bits, blocks, scales)) < MOST
    assert taken(lambda: codec.encode(bits, blocks, scales, hints)) < MOST


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("code", [0x00, 0x77, 0xFF])
def test_decoding_any_scale_takes_no_memory(scale: int, code: int) -> None:
    *rows, columns = SHAPE
    blocks = np.full((*rows, columns // 32, 16), code, np.uint8)
    scales = np.full((*rows, columns // 32), scale, np.uint8)
    values = np.empty(SHAPE, np.uint16)
    weights = [np.ones(length, np.uint64) for length in SHAPE]

    def all_of_it() -> None:
        sums.scale_statistics(blocks, scales)
        try:
            codec.decode(blocks, scales, values)
            sums.weighted_sum(blocks, scales, weights)
        except CodecError:
            assert scale > 252

    assert taken(all_of_it) < MOST


@pytest.mark.parametrize("rule", RULES)
def test_rounding_values_takes_no_memory(rule: Any, bits: Bits) -> None:
    from gptoss_convert.codecs.mxfp4 import CODEC
    from gptoss_convert.quantise.rounding import Ruled

    few = bits[:1, :64]
    *rows, columns = few.shape
    blocks = np.empty((*rows, columns // 32, 16), np.uint8)
    scales = np.empty((*rows, columns // 32), np.uint8)
    one = Ruled(CODEC, rule)
    assert taken(lambda: one.encode(few, {"blocks": blocks, "scales": scales}, {})) < 8 * MOST

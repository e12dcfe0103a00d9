from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gptoss_convert.codecs.mxfp4 import codec as mxfp4
from gptoss_convert.codecs.mxfp4 import library, reference
from gptoss_convert.codecs.stats import EncodeStats
from gptoss_convert.errors import CodecError, UsageError

U8 = NDArray[np.uint8]
U16 = NDArray[np.uint16]

# Rows below, at and beyond what is treated side by side (32) and together (384), and remainders.
SHAPES = [(1, 1), (7, 1), (32, 3), (64, 2), (71, 3), (384, 1), (430, 2)]


def straight(rows: int, width: int) -> U16:
    return np.zeros((rows, width), np.uint16)


def across(rows: int, width: int) -> U16:
    return np.zeros((width, rows), np.uint16).T


def across_with_gaps(rows: int, width: int) -> U16:
    return np.zeros((width, 2 * rows), np.uint16).T[1::2]


def slice_of_rows(rows: int, width: int) -> U16:
    return np.zeros((rows + 3, width + 5), np.uint16)[2:-1, 3:-2]


def slice_of_columns(rows: int, width: int) -> U16:
    return np.zeros((width + 5, rows + 3), np.uint16)[3:-2, 2:-1].T


def sparse(rows: int, width: int) -> U16:
    return np.zeros((3 * rows, 3 * width), np.uint16)[::3, 1::3]


def backwards(rows: int, width: int) -> U16:
    return np.zeros((rows, width), np.uint16)[::-1, ::-1]


def unaligned(rows: int, width: int) -> U16:
    return np.zeros(2 * rows * width + 1, np.uint8)[1:].view(np.uint16).reshape(rows, width)


VIEWS = [
    straight,
    across,
    across_with_gaps,
    slice_of_rows,
    slice_of_columns,
    sparse,
    backwards,
    unaligned,
]


@pytest.fixture(params=[*library.LEVELS, "numpy"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test on the kernels for each processor that this one can stand in for, and on numpy."""
    monkeypatch.setenv(library.VARIABLE, request.param)
    try:
        if library.load() is None and request.param != "numpy":
            pytest.skip("no compiled kernels")
    except UsageError as error:
        pytest.skip(str(error))
    return request.param


def random_blocks(rows: int, groups: int, seed: int = 0, top: int = 253) -> tuple[U8, U8]:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows, groups, 16), dtype=np.uint8)
    return blocks, rng.integers(0, top, (rows, groups), dtype=np.uint8)


def decoded(blocks: U8, scales: U8) -> U16:
    return reference.decode_blocks(blocks, scales).reshape(*scales.shape[:-1], -1)


def every_pair() -> tuple[U8, U8]:
    """Every byte under every scale: blocks (256 scales, 16 groups, 16)."""
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    scales = np.repeat(np.arange(256, dtype=np.uint8)[:, None], 16, axis=1)
    return blocks.copy(), scales


def bits_of(values: NDArray[np.float64]) -> U16:
    """BF16 bits of values that BF16 holds exactly."""
    bits = values.astype(np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any()
    return (bits >> 16).astype(np.uint16)


def floats(bits: U16) -> NDArray[np.float64]:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def encoded(values: U16, hints: U8 | None = None) -> tuple[U8, U8, EncodeStats]:
    rows, width = values.shape
    blocks = np.full((rows, width // 32, 16), 0xEE, np.uint8)
    scales = np.full((rows, width // 32), 0xEE, np.uint8)
    stats = mxfp4.encode(values, blocks, scales, hints)
    return blocks, scales, stats


# Decoding


def test_every_byte_under_every_scale_is_what_transformers_computes(path: str) -> None:
    torch = pytest.importorskip("torch")
    module = pytest.importorskip("transformers.integrations.mxfp4")
    blocks, scales = every_pair()
    blocks, scales = blocks[:253], scales[:253]
    peer = module.convert_moe_packed_tensors(
        torch.from_numpy(blocks)[None], torch.from_numpy(scales)[None]
    )
    expected = peer[0].contiguous().view(torch.uint16).numpy()
    for view in straight, across:
        values = view(253, 512)
        mxfp4.decode(blocks, scales, values)
        np.testing.assert_array_equal(values, expected.T)


def test_every_byte_under_every_scale_is_the_definition_in_float64(path: str) -> None:
    blocks, scales = every_pair()
    blocks, scales = blocks[:253], scales[:253]
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.stack([blocks & 15, blocks >> 4], axis=-1).reshape(253, 512)
    magnitudes = np.ldexp(grid[codes & 7], np.arange(253)[:, None] - 127)
    values = straight(253, 512)
    mxfp4.decode(blocks, scales, values)
    np.testing.assert_array_equal(values, bits_of(np.where(codes & 8, -magnitudes, magnitudes)))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_fills_any_view(
    view: Callable[[int, int], U16], shape: tuple[int, int], path: str
) -> None:
    blocks, scales = random_blocks(*shape)
    values = view(shape[0], shape[1] * 32)
    mxfp4.decode(blocks, scales, values)
    np.testing.assert_array_equal(values, decoded(blocks, scales))


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(7, 1), (71, 3), (128, 9), (430, 2)])
def test_blocks_are_the_same_as_their_values_until_any_bit_differs(
    view: Callable[[int, int], U16], shape: tuple[int, int], path: str
) -> None:
    blocks, scales = random_blocks(*shape)
    values = view(shape[0], shape[1] * 32)
    values[...] = decoded(blocks, scales)
    assert mxfp4.same(blocks, scales, values)
    rng = np.random.default_rng(2)
    corners = [(0, 0), (shape[0] - 1, values.shape[1] - 1)]
    for at in [*corners, *(tuple(rng.integers(0, values.shape)) for _ in range(60))]:
        bit = np.uint16(1 << rng.integers(16))
        values[at] ^= bit
        assert not mxfp4.same(blocks, scales, values)
        values[at] ^= bit
    assert mxfp4.same(blocks, scales, values)


def test_blocks_that_are_no_number_are_the_same_as_nothing(path: str) -> None:
    blocks, scales = random_blocks(3, 2)
    values = straight(3, 64)
    scales[1, 1] = 255
    with pytest.raises(CodecError, match=r"block \(1, 1\): .* found 255, is NaN"):
        mxfp4.same(blocks, scales, values)


@pytest.mark.parametrize("view", [slice_of_rows, slice_of_columns, across_with_gaps])
def test_decode_writes_nothing_beside_the_view(view: Callable[[int, int], U16]) -> None:
    blocks, scales = random_blocks(71, 3)
    values = view(71, 96)
    memory = values
    while isinstance(memory.base, np.ndarray):
        memory = memory.base
    memory[...] = 0x5A5A
    values[...] = 0
    untouched = memory == 0x5A5A
    mxfp4.decode(blocks, scales, values)
    assert (memory[untouched] == 0x5A5A).all()


def test_decode_takes_gate_and_up_apart(path: str) -> None:
    blocks, scales = random_blocks(2 * 70, 3)
    values = np.zeros((2, 70, 96), np.uint16)
    rows = values.transpose(1, 0, 2)
    mxfp4.decode(blocks.reshape(70, 2, 3, 16), scales.reshape(70, 2, 3), rows)
    expected = decoded(blocks, scales)
    np.testing.assert_array_equal(values[0], expected[0::2])
    np.testing.assert_array_equal(values[1], expected[1::2])


def test_decode_reads_slices_and_read_only_memory(path: str) -> None:
    blocks, scales = random_blocks(80, 7)
    blocks.flags.writeable = scales.flags.writeable = False
    values = across(9, 96)
    part = slice(2, 74, 8), slice(3, 6)
    mxfp4.decode(blocks[part], scales[part], values)
    np.testing.assert_array_equal(values, decoded(blocks[part], scales[part]))


def test_empty_views_are_done_at_once() -> None:
    blocks, scales = random_blocks(0, 4)
    values = straight(0, 128)
    mxfp4.decode(blocks, scales, values)
    assert mxfp4.encode(values, blocks, scales) == EncodeStats()


def test_scales_253_and_254_decode_where_bfloat16_has_the_values(path: str) -> None:
    blocks = np.zeros((2, 1, 16), np.uint8)
    blocks[0] = 0xD5  # +-3
    blocks[1] = 0xB3  # +-1.5
    scales = np.array([[253], [254]], np.uint8)
    for view in straight, across:
        values = view(2, 32)
        mxfp4.decode(blocks, scales, values)
        assert floats(values[0])[:2].tolist() == [3 * 2.0**126, -3 * 2.0**126]
        assert floats(values[1])[:2].tolist() == [1.5 * 2.0**127, -1.5 * 2.0**127]


@pytest.mark.parametrize(
    ("scale", "code", "found"),
    [
        (255, 0, "255, is NaN"),
        (254, 4, "254, with code 4 overflows BF16"),
        (253, 6, "253, with code 6 overflows BF16"),
    ],
)
def test_a_block_without_a_value_is_refused_by_its_index(
    scale: int, code: int, found: str, path: str
) -> None:
    blocks, scales = np.zeros((40, 2, 90, 16), np.uint8), np.full((40, 2, 90), 120, np.uint8)
    scales[30:, 0, 17] = scale if scale < 255 else 254
    scales[31, 1, 5] = scale
    blocks[31, 1, 5, 9] = code << 4 | 8
    values = np.zeros((40, 2, 90 * 32), np.uint16)
    with pytest.raises(CodecError) as error:
        mxfp4.decode(blocks, scales, values)
    assert str(error.value) == f"block (31, 1, 5): expected a scale byte 0..252, found {found}"
    assert not values.any()


def test_shapes_that_disagree_are_refused() -> None:
    blocks, scales = random_blocks(4, 3)
    with pytest.raises(ValueError, match=r"values: expected shape \(4, 96\), found \(96, 4\)"):
        mxfp4.decode(blocks, scales, straight(96, 4))
    with pytest.raises(ValueError, match=r"blocks: expected shape \(4, 2, 16\)"):
        mxfp4.encode(straight(4, 64), blocks, scales[:, :2])
    with pytest.raises(ValueError, match=r"hints: expected shape \(4, 3\), found \(4, 2\)"):
        mxfp4.encode(straight(4, 96), blocks, scales, scales[:, :2])


# Encoding


@pytest.mark.parametrize("view", [straight, across])
def test_encoding_returns_the_values_of_every_magnitude_set_under_every_scale(
    view: Callable[[int, int], U16], path: str
) -> None:
    subsets = [s for n in range(1, 9) for s in itertools.combinations(range(8), n)]
    scales_of_rows = range(253) if path != "numpy" else [0, 1, 2, 3, 4, 127, 251, 252]
    codes = np.stack([np.resize(subset, 32) for subset in subsets]).astype(np.uint8)
    codes[:, 1::3] |= 8
    pairs = (codes[:, 0::2] | codes[:, 1::2] << 4).astype(np.uint8)
    blocks = np.broadcast_to(pairs, (len(scales_of_rows), 255, 16))
    scales = np.repeat(np.array(scales_of_rows, np.uint8)[:, None], 255, axis=1)
    values = view(len(scales_of_rows), 255 * 32)
    mxfp4.decode(blocks, scales, values)
    packed, chosen, stats = encoded(values)
    again = straight(*values.shape)
    mxfp4.decode(packed, chosen, again)
    np.testing.assert_array_equal(again, values)
    assert stats.inexact_blocks == 0 and stats.inexact_values == 0 and stats.first_inexact == -1
    packed, chosen, stats = encoded(values, scales)
    np.testing.assert_array_equal(packed, blocks)
    np.testing.assert_array_equal(chosen, scales)


def rounded_up_gaussian() -> tuple[U8, U8]:
    """Blocks with the scale that OpenAI's kernels choose, 2^ceil(log2(amax / 6))."""
    values = np.random.default_rng(3).normal(size=(64, 90, 32)) * 0.02
    exponent = np.ceil(np.log2(np.abs(values).max(axis=-1) / 6)).astype(np.int64)
    ratio = np.ldexp(values, -exponent[..., None])
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    codes = np.abs(np.abs(ratio)[..., None] - grid).argmin(axis=-1).astype(np.uint8)
    codes |= np.where(ratio < 0, 8, 0).astype(np.uint8)
    return codes[..., 0::2] | codes[..., 1::2] << 4, (exponent + 127).astype(np.uint8)


@pytest.mark.parametrize("view", [straight, across])
def test_hints_bring_back_the_bytes_that_the_rule_alone_does_not(
    view: Callable[[int, int], U16], path: str
) -> None:
    blocks, scales = rounded_up_gaussian()
    values = view(64, 90 * 32)
    mxfp4.decode(blocks, scales, values)
    _, chosen, stats = encoded(values)
    assert stats.inexact_blocks == 0
    assert 0.25 < np.count_nonzero(chosen != scales) / scales.size < 0.30
    packed, hinted, stats = encoded(values, scales)
    np.testing.assert_array_equal(packed, blocks)
    np.testing.assert_array_equal(hinted, scales)
    assert stats.hinted_blocks == np.count_nonzero(chosen != scales)


@pytest.mark.parametrize("view", [straight, across])
def test_hints_253_and_254_are_taken_where_they_are_exact(
    view: Callable[[int, int], U16], path: str
) -> None:
    rows = 64
    scales = np.resize(np.array([253, 254], np.uint8), (rows, 1))
    codes = np.random.default_rng(4).integers(0, 8, (rows, 1, 16), dtype=np.uint8)
    blocks = np.minimum(codes, np.where(scales == 253, 5, 3)[..., None]).astype(np.uint8)
    values = view(rows, 32)
    mxfp4.decode(blocks, scales, values)
    packed, chosen, stats = encoded(values, scales)
    np.testing.assert_array_equal(packed, blocks)
    np.testing.assert_array_equal(chosen, scales)
    assert stats.hinted_blocks == rows
    values[::2, 0] = 0x7F7F
    expected = reference.encode_blocks(np.ascontiguousarray(values)[:, None], scales)
    packed, chosen, stats = encoded(values, scales)
    np.testing.assert_array_equal(packed, expected[0])
    np.testing.assert_array_equal(chosen, expected[1])
    assert stats.hinted_blocks == rows // 2


@pytest.mark.parametrize("view", [straight, across])
def test_wrong_hints_change_no_value(view: Callable[[int, int], U16], path: str) -> None:
    blocks, scales = random_blocks(70, 8, top=250)
    blocks[::5, ::3] = 0x80
    values = view(70, 256)
    mxfp4.decode(blocks, scales, values)
    for shift in (-1, 1, 2, 5, 128):
        packed, chosen, stats = encoded(values, scales + np.uint8(shift % 256))
        again = straight(70, 256)
        mxfp4.decode(packed, chosen, again)
        np.testing.assert_array_equal(again, values)
        assert stats.inexact_blocks == 0


def test_zero_blocks_have_scale_0_or_their_hint_and_keep_the_sign(path: str) -> None:
    values = straight(1, 5 * 32)
    values[:, ::2] = 0x8000
    hints = np.array([[0, 120, 252, 253, 255]], np.uint8)
    packed, chosen, stats = encoded(values, hints)
    assert chosen.tolist() == [[0, 120, 252, 0, 0]]
    assert (packed == 0x08).all()
    assert stats.zero_blocks == 5 and stats.hinted_blocks == 2
    assert (stats.min_scale, stats.max_scale) == (255, 0)


def test_rounding_is_to_nearest_even_for_every_bfloat16(path: str) -> None:
    """Against a brute-force search in float64, independent of the reference's arithmetic."""
    rng = np.random.default_rng(5)
    values = np.zeros((254, 32), np.uint16)
    for exponent in range(254):
        values[exponent] = rng.integers(0, (exponent + 1) << 7, 32)
        values[exponent, :8] = np.maximum((exponent - np.arange(8)) * 128 + 64, 0)
        values[exponent, 8:16] = np.maximum((exponent - np.arange(8)) * 128 + 32, 0)
        values[exponent, 16] = (exponent << 7) + rng.integers(0, 128)
    values |= rng.integers(0, 2, values.shape, dtype=np.uint16) << 15
    packed, chosen, stats = encoded(values)
    real = floats(values)
    amax = np.abs(real).max(axis=1)
    want = [max(min(int(np.floor(np.log2(a))) - 2 + 127, 252), 0) for a in amax]
    assert chosen[:, 0].tolist() == want
    grid = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    distance = np.abs(np.abs(np.ldexp(real, 127 - chosen.astype(int)))[..., None] - grid)
    nearest = distance == distance.min(axis=-1, keepdims=True)
    even = nearest & (np.arange(8) % 2 == 0)
    codes = np.where(even.any(axis=-1), even.argmax(axis=-1), nearest.argmax(axis=-1))
    found = np.stack([packed & 15, packed >> 4], axis=-1).reshape(254, 32)
    np.testing.assert_array_equal(found & 7, codes)
    np.testing.assert_array_equal(found >> 3, values >> 15)
    back = np.ldexp(grid[codes], chosen.astype(int) - 127)
    assert stats.inexact_values == np.count_nonzero(back != np.abs(real))
    assert stats.flushed == np.count_nonzero((codes == 0) & (real != 0))


def awkward_values(rows: int, groups: int) -> U16:
    """Exact, rounded, subnormal, zero and non-finite blocks, in random order."""
    rng = np.random.default_rng(7)
    values = reference.bf16_bits(rng.normal(size=(rows, groups, 32)).astype(np.float32))
    kind = rng.integers(0, 6, (rows, groups))
    blocks, scales = random_blocks(rows, groups, seed=8)
    exact = reference.decode_blocks(blocks, scales)
    values[kind == 0] = exact[kind == 0]
    values[kind == 1] &= 0x8000
    values[kind == 2] &= 0x81FF
    values[kind == 3, 11] = 0x7F80
    values[kind == 4, 12] = 0xFFC1
    return values.reshape(rows, groups * 32)


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("shape", [(7, 1), (71, 3), (128, 9), (430, 2)])
def test_every_kernel_encodes_as_the_reference_does(
    view: Callable[[int, int], U16], shape: tuple[int, int]
) -> None:
    rows, groups = shape
    values = view(rows, groups * 32)
    values[...] = awkward_values(rows, groups)
    hints = np.random.default_rng(9).integers(118, 130, shape, dtype=np.uint8)
    grouped = np.ascontiguousarray(values).reshape(rows, groups, 32)
    blocks, scales, stats = reference.encode_blocks(grouped, hints)
    packed, chosen, found = encoded(values, hints)
    np.testing.assert_array_equal(packed, blocks)
    np.testing.assert_array_equal(chosen, scales)
    sums = ("squares", "squared_error")
    for name in EncodeStats.__dataclass_fields__:
        expected = getattr(stats, name)
        if name in sums:
            expected = pytest.approx(expected, rel=1e-12)
        assert getattr(found, name) == expected, name


def test_statistics_say_what_an_encoding_lost(path: str) -> None:
    values = np.zeros((1, 128))
    values[0, 32] = 448.0  # clipped to 384
    values[0, 33] = 16.0  # a tie with 0
    values[0, 34] = 64.0
    values[0, 64:67] = 4.0, 1.25, -0.125  # 1.25 becomes 1, 0.125 becomes 0
    values[0, 96] = 6.0
    bits = bits_of(values)
    bits[0, 97] = 0x7FC0
    _, scales, stats = encoded(bits)
    assert scales.tolist() == [[0, 133, 127, 127]]
    assert stats == EncodeStats(
        blocks=4,
        inexact_blocks=3,
        inexact_values=5,
        nonfinite=1,
        clipped=1,
        flushed=2,
        zero_blocks=1,
        min_scale=127,
        max_scale=133,
        squares=64**2 * (49 + 0.0625 + 1) + 16 + 1.5625 + 0.015625 + 36,
        squared_error=64**2 * (1 + 0.0625) + 0.0625 + 0.015625,
        max_abs_error=64.0,
        hinted_blocks=0,
        first_inexact=1,
    )


def test_statistics_of_parts_add_up_to_those_of_the_whole() -> None:
    values = awkward_values(90, 4)
    values[:50] = 0
    whole = encoded(values)[2]
    parts = encoded(values[:41])[2] + encoded(values[41:])[2]
    assert parts.first_inexact == whole.first_inexact >= 200
    assert parts.blocks == whole.blocks and parts.inexact_values == whole.inexact_values
    assert parts.squared_error == pytest.approx(whole.squared_error)


# Compilation


def in_a_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=True,
    )


ROUND_TRIP = """
import numpy as np
from gptoss_convert.codecs.mxfp4 import codec
blocks = np.random.default_rng(0).integers(0, 256, (9, 2, 16), dtype=np.uint8)
scales = np.full((9, 2), 127, np.uint8)
values = np.zeros((64, 9), np.uint16).T
codec.decode(blocks, scales, values)
packed = np.zeros_like(blocks)
codec.encode(values, packed, np.zeros_like(scales), scales)
assert (packed == blocks).all()
"""


def test_this_processor_s_own_kernels_are_used() -> None:
    kernels = library.load()
    if kernels is None:
        pytest.skip("no compiled kernels")
    flags = set(re.findall(r"\w+", Path("/proc/cpuinfo").read_text()))
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    expected = "avx512" if wide else "avx2" if "avx2" in flags else "baseline"
    assert kernels.decode.__name__ == f"decode_{expected}"


def test_numpy_can_be_asked_for() -> None:
    code = "import ctypes\nctypes.CDLL = None\n" + ROUND_TRIP
    assert in_a_new_process(code, GPTOSS_CONVERT_KERNELS="numpy").stderr == ""


def test_where_there_was_no_compiler_one_line_says_so() -> None:
    absent = (
        "from gptoss_convert.codecs.mxfp4 import library\n"
        "library.PATH = library.SOURCE = library.Path('missing')\n"
    )
    assert in_a_new_process(absent + ROUND_TRIP, GPTOSS_CONVERT_KERNELS="").stderr == (
        "gptoss-convert: no C compiler was found when this package was installed; "
        "using the slower numpy kernels\n"
    )


def test_kernels_older_than_their_source_are_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(library, "PATH", tmp_path / "old")
    monkeypatch.setattr(library, "SOURCE", tmp_path / "new")
    monkeypatch.delenv(library.VARIABLE, raising=False)
    for seconds, path in enumerate((library.PATH, library.SOURCE)):
        path.touch()
        os.utime(path, (seconds, seconds))
    assert library.load() is None
    assert capsys.readouterr().err == (
        "gptoss-convert: kernels.c is not compiled (python setup.py build_ext --inplace); "
        "using the slower numpy kernels\n"
    )


def test_kernels_for_an_unknown_processor_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if library.load() is None:
        pytest.skip("no compiled kernels")
    monkeypatch.setenv(library.VARIABLE, "sse9")
    with pytest.raises(UsageError, match=r"^GPTOSS_CONVERT_KERNELS: expected one of numpy, base.*"):
        library.load()


def test_what_is_called_is_what_the_source_exports() -> None:
    source = library.SOURCE.read_text(encoding="utf-8")
    assert re.findall(r"^KERNEL\(\w+, (\w+)", source, re.MULTILINE) == [*library._SIGNATURES]

from __future__ import annotations

import itertools

import numpy as np
import pytest

from gptoss_convert.codecs.mxfp4 import relayout
from gptoss_convert.compare.arrays import equal


def numbered(shape: tuple[int, ...], dtype: type = np.uint16) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape, dtype=dtype)


@pytest.mark.parametrize("hidden", [8, 64, 71, 130, 520])
@pytest.mark.parametrize("inter", [4, 32, 37, 100, 260])
def test_gate_and_up_are_split_and_joined_while_transposing(hidden: int, inter: int) -> None:
    interleaved = numbered((hidden, 2 * inter))
    halves = np.zeros((2, inter, hidden), np.uint16)
    pairs = interleaved.reshape(hidden, inter, 2).transpose(2, 1, 0)
    relayout.copy(pairs, halves)
    np.testing.assert_array_equal(halves[0], interleaved[:, 0::2].T)
    np.testing.assert_array_equal(halves[1], interleaved[:, 1::2].T)
    joined = np.zeros_like(interleaved)
    relayout.copy(halves, joined.reshape(hidden, inter, 2).transpose(2, 1, 0))
    np.testing.assert_array_equal(joined, interleaved)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(3, 40, 17), (2, 33, 64), (40, 2, 35), (35, 70, 2)])
def test_every_permutation_of_axes_arrives(shape: tuple[int, ...], dtype: type) -> None:
    source = numbered(shape, dtype)
    for order in itertools.permutations(range(3)):
        target = np.zeros([shape[axis] for axis in order], dtype)
        relayout.copy(source.transpose(order), target)
        np.testing.assert_array_equal(target, source.transpose(order))
        back = np.zeros(shape, dtype)
        relayout.copy(target, back.transpose(order))
        np.testing.assert_array_equal(back, source)


def test_nothing_is_written_beside_the_view() -> None:
    source = numbered((90, 50))
    memory = np.full((60, 100), 0x5A5A, np.uint16)
    relayout.copy(source.T, memory[3:53, 5:95])
    np.testing.assert_array_equal(memory[3:53, 5:95], source.T)
    memory[3:53, 5:95] = 0x5A5A
    assert (memory == 0x5A5A).all()


def test_sliced_backward_unaligned_and_read_only_views_are_copied() -> None:
    source = numbered((200, 120))
    source.flags.writeable = False
    for view in source[::2, 1::3].T, source[::-1, 10:].T, source[5:70, 3:].T:
        target = np.zeros(view.shape, np.uint16)
        relayout.copy(view, target)
        np.testing.assert_array_equal(target, view)
    odd = np.zeros(source.nbytes + 1, np.uint8)[1:].view(np.uint16).reshape(120, 200)
    relayout.copy(source.T, odd)
    np.testing.assert_array_equal(odd, source.T)


def test_numpy_and_kernel_copy_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    source = numbered((65, 66))
    target = np.zeros((66, 65), np.uint16)
    with monkeypatch.context() as patch:
        patch.setattr(np, "copyto", None)  # the kernel does it: numpy is not asked
        relayout.copy(source.T, target)
    np.testing.assert_array_equal(target, source.T)


def test_copies_between_shapes_or_dtypes_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"target: expected uint16 \(2, 3\), found uint16 \(3, 2\)"
    ):
        relayout.copy(np.zeros((2, 3), np.uint16), np.zeros((3, 2), np.uint16))
    with pytest.raises(ValueError, match=r"target: expected uint16 \(2,\), found uint8 \(2,\)"):
        relayout.copy(np.zeros(2, np.uint16), np.zeros(2, np.uint8))


def test_casts_round_to_nearest_even_as_torch_does() -> None:
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 1 << 32, 200_000, dtype=np.uint32)
    bits[:1000] = (bits[:1000] & 0xFFFF0000) | 0x8000
    bits[1000:2000] &= 0xFFFF0000
    source = bits.view(np.float32)
    finite_or_infinite = ~np.isnan(source)
    target = np.zeros(source.shape, np.uint16)
    changed = relayout.cast(source, target)
    expected = torch.from_numpy(source).to(torch.bfloat16)
    same = expected.view(torch.uint16).numpy()
    np.testing.assert_array_equal(target[finite_or_infinite], same[finite_or_infinite])
    back = expected.float().numpy()
    assert changed == np.count_nonzero((back != source) & finite_or_infinite)
    nan = target[~finite_or_infinite]
    assert nan.size and (nan & 0x7FFF > 0x7F80).all()


def test_half_precision_is_cast_through_its_exact_value() -> None:
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    every = every[~np.isnan(every)]
    half, single = np.zeros(every.shape, np.uint16), np.zeros(every.shape, np.uint16)
    changed = relayout.cast(every, half)
    assert changed == relayout.cast(every.astype(np.float32), single)
    np.testing.assert_array_equal(half, single)
    assert changed == np.count_nonzero(every.astype(np.float32).view(np.uint32) & 0xFFFF)


def test_casts_between_strided_views_of_several_chunks() -> None:
    source = np.random.default_rng(2).normal(size=(300, 500)).astype(np.float32)
    target = np.zeros((500, 300), np.uint16)
    assert relayout.cast(source, target.T) == np.count_nonzero(source.view(np.uint32) & 0xFFFF)
    expected = np.zeros((300, 500), np.uint16)
    relayout.cast(source, expected)
    np.testing.assert_array_equal(target.T, expected)
    assert relayout.cast(source[:0], target[:, :0].T) == 0


def test_casts_between_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"target: expected shape \(2, 3\), found \(3, 2\)"):
        relayout.cast(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.uint16))


@pytest.mark.parametrize("shape", [(40, 33), (8, 8), (130, 70), (513, 9)])
def test_views_across_are_the_same_until_any_element_differs(shape: tuple[int, int]) -> None:
    ours = numbered(shape)
    theirs = np.ascontiguousarray(ours.T)
    small = ours.size < 1 << 10
    assert relayout.same_across(ours, theirs.T) is (None if small else True)
    rng = np.random.default_rng(1)
    for _ in range(200):
        place, bit = rng.integers(shape[1]), np.uint16(1 << rng.integers(16))
        at = (place, rng.integers(shape[0]))
        theirs[at] ^= bit
        assert equal(ours, theirs.T) is False and equal(theirs.T, ours) is False
        theirs[at] ^= bit
    assert equal(ours, theirs.T) and equal(theirs, ours.T)


def test_gate_and_up_that_lie_across_in_pairs_are_compared() -> None:
    interleaved = numbered((96, 2 * 70))
    pairs = interleaved.reshape(96, 70, 2).transpose(2, 1, 0)
    halves = pairs.copy()
    assert relayout.same_across(pairs, halves) is True
    for at in [(0, 0, 0), (1, 69, 95), (1, 3, 17)]:
        halves[at] ^= 1
        assert relayout.same_across(pairs, halves) is False
        halves[at] ^= 1

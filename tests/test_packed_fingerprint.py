"""The fingerprint of MXFP4 blocks, summed without decoding, is that of their decoded values."""

import numpy as np
import pytest

from gptoss_convert.codecs.mxfp4 import CODEC
from gptoss_convert.codecs.mxfp4 import codec as mxfp4
from gptoss_convert.codecs.mxfp4.sums import weighted_sum
from gptoss_convert.engine.fingerprint import fingerprint
from gptoss_convert.engine.fingerprint import packed_fingerprint as of_members
from gptoss_convert.errors import CodecError

RNG = np.random.default_rng(5)


def decoded(blocks, scales):
    values = np.empty((*scales.shape[:-1], scales.shape[-1] * 32), np.uint16)
    mxfp4.decode(blocks, scales, values)
    return values


def packed_fingerprint(blocks, scales, box, lengths, layer):
    return of_members(CODEC, {"blocks": blocks, "scales": scales}, box, lengths, layer)


@pytest.mark.parametrize("layer", [-1, 0])
@pytest.mark.parametrize("odd", [False, True], ids=["usual scales", "every scale"])
@pytest.mark.parametrize("compiled", [True, False], ids=["kernel", "by pieces"])
def test_equals_the_fingerprint_of_the_values(layer, odd, compiled, monkeypatch) -> None:
    if not compiled:
        monkeypatch.setattr("gptoss_convert.codecs.mxfp4.sums.library.load", lambda: None)
    rows = 1 if layer == 0 else 3
    blocks = RNG.integers(0, 256, (rows, 7, 5, 16), dtype=np.uint8)
    scales = RNG.integers(0 if odd else 2, 253, (rows, 7, 5), dtype=np.uint8)
    box = ((2, 2 + rows), (10, 17), (64, 224))
    found = packed_fingerprint(blocks, scales, box, (9, 40, 320), layer)
    assert found == fingerprint(decoded(blocks, scales), box, (9, 40, 320), layer)


def test_one_index_of_an_axis_has_its_weight() -> None:
    blocks = RNG.integers(0, 256, (1, 7, 5, 16), dtype=np.uint8)
    scales = RNG.integers(0, 253, (1, 7, 5), dtype=np.uint8)
    box, lengths = ((2, 3), (10, 17), (64, 224)), (9, 40, 320)
    found = packed_fingerprint(blocks, scales, box, lengths, -1)
    assert found == fingerprint(decoded(blocks, scales), box, lengths, -1)


def test_views_with_gaps_between_rows_and_groups() -> None:
    wide = RNG.integers(0, 256, (4, 12, 9, 24), dtype=np.uint8)
    blocks = wide[::2, 1::3, ::2, 4:20]
    scales = RNG.integers(0, 253, (4, 6, 15), dtype=np.uint8)[1:3, 1:5, ::3]
    box, lengths = ((0, 2), (3, 7), (0, 160)), (2, 12, 160)
    found = packed_fingerprint(blocks, scales, box, lengths, -1)
    assert found == fingerprint(decoded(blocks.copy(), scales.copy()), box, lengths, -1)


def test_rows_longer_than_one_run_of_blocks() -> None:
    blocks = RNG.integers(0, 256, (2, 3, 70, 16), dtype=np.uint8)
    scales = RNG.integers(0, 253, (2, 3, 70), dtype=np.uint8)
    box, lengths = ((0, 2), (0, 3), (0, 70 * 32)), (2, 3, 70 * 32)
    found = packed_fingerprint(blocks, scales, box, lengths, -1)
    assert found == fingerprint(decoded(blocks, scales), box, lengths, -1)


@pytest.mark.parametrize("byte", range(16))
def test_every_byte_of_a_block_counts(byte: int) -> None:
    blocks = RNG.integers(0, 256, (1, 2, 3, 16), dtype=np.uint8)
    scales = np.full((1, 2, 3), 120, np.uint8)
    box, lengths = ((0, 1), (0, 2), (0, 96)), (1, 2, 96)
    before = packed_fingerprint(blocks, scales, box, lengths, -1)
    blocks[0, 1, 2, byte] ^= 0x20
    assert packed_fingerprint(blocks, scales, box, lengths, -1) != before


@pytest.mark.parametrize("weight", [0x7FFF7FFF7FFF7FFF, 0x8000800080008000, (1 << 64) - 1])
def test_the_largest_values_and_weights_do_not_overflow(weight: int) -> None:
    blocks, scales = np.full((1, 70, 16), 0xFF, np.uint8), np.full((1, 70), 252, np.uint8)
    weights = [np.ones(1, np.uint64), np.full(70 * 32, weight, np.uint64)]
    found = weighted_sum(blocks, scales, weights)
    if found is None:
        pytest.skip("no compiled kernels")
    bits = int(decoded(blocks[:, :1], scales[:, :1])[0, 0])
    assert found == bits * weight * 70 * 32 % (1 << 64)


def test_a_scale_that_is_no_number_is_refused() -> None:
    blocks, scales = np.zeros((1, 1, 1, 16), np.uint8), np.full((1, 1, 1), 255, np.uint8)
    with pytest.raises(CodecError):
        packed_fingerprint(blocks, scales, ((0, 1), (0, 1), (0, 32)), (1, 1, 32), -1)

"""Positional reading: every element of any box, from any chunks, once; errors name the file."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_convert.containers import Chunk
from gptoss_convert.errors import IntegrityError
from gptoss_convert.witness import fetch
from gptoss_convert.witness.fetch import Fetcher, ranges_of

CPU = torch.device("cpu")
SHAPE = (3, 4, 5, 6)


def stored(folder: Path, cuts: tuple[tuple[int, ...], ...]) -> tuple[np.ndarray, list[Chunk]]:
    """A tensor of numbered elements, stored as a grid of boxes in one file."""
    whole = np.arange(np.prod(SHAPE), dtype=np.uint16).reshape(SHAPE)
    chunks, content = [], bytearray(b"xyz")
    spans = [[*zip((0, *cut), (*cut, n), strict=True)] for cut, n in zip(cuts, SHAPE, strict=True)]
    for box in product(*spans):
        part = whole[tuple(slice(*span) for span in box)]
        start = tuple(low for low, _ in box)
        chunks.append(Chunk("t", "BF16", SHAPE, start, part.shape, "f", len(content)))
        content += part.tobytes()
    (folder / "f").write_bytes(content)
    return whole, chunks


cut = st.integers(1, 2).map(lambda at: (at,)) | st.just(())
spans = st.tuples(*(st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in SHAPE))


@settings(max_examples=60, deadline=None)
@given(cuts=st.tuples(cut, cut, cut, cut), box=spans)
def test_every_box_arrives_whole_from_any_chunks(
    tmp_path_factory: pytest.TempPathFactory,
    cuts: tuple[tuple[int, ...], ...],
    box: tuple[tuple[int, int], ...],
) -> None:
    folder = tmp_path_factory.mktemp("fetch")
    whole, chunks = stored(folder, cuts)
    box = tuple((low, max(high, low + 1)) for low, high in box)
    expected = whole[tuple(slice(*span) for span in box)]
    ranges = ranges_of(folder, chunks, box)
    assert sum(one.nbytes for one in ranges) == expected.nbytes
    found = Fetcher(CPU).read(ranges).numpy().view(np.uint16).reshape(expected.shape)
    assert np.array_equal(found, expected)


def test_a_whole_tensor_is_one_run_and_is_read_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, chunks = stored(tmp_path, ((), (), (), ()))
    ranges = ranges_of(tmp_path, chunks, tuple((0, n) for n in SHAPE))
    assert len(ranges) == 1
    monkeypatch.setattr(fetch, "PIECE", 100)
    assert [sum(one.nbytes for one in piece) for piece in fetch._pieces(ranges)] == [*[100] * 7, 20]
    assert Fetcher(CPU).read(ranges).numpy().tobytes() == whole.tobytes()


def test_what_was_begun_ahead_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, chunks = stored(tmp_path, ((1,), (), (), ()))
    layers = [ranges_of(tmp_path, chunks, ((n, n + 1), (0, 4), (0, 5), (0, 6))) for n in range(3)]
    fetcher = Fetcher(CPU, max_ahead=2 * 240)
    fetcher.ahead(layers[:2])
    fetcher.ahead(layers[:2])
    fetcher.ahead(layers[2:])  # no room
    assert set(fetcher._ahead) == set(layers[:2])
    found = [fetcher.read(ranges).numpy().tobytes() for ranges in layers]
    assert found == [layer.tobytes() for layer in whole]
    assert not fetcher._ahead


def test_a_file_that_became_shorter_is_named(tmp_path: Path) -> None:
    _, chunks = stored(tmp_path, ((), (), (), ()))
    ranges = ranges_of(tmp_path, chunks, tuple((0, n) for n in SHAPE))
    with (tmp_path / "f").open("r+b") as file:
        file.truncate(103)
    message = r"f: truncated: expects 720 bytes at 3, found 100"
    with pytest.raises(IntegrityError, match=message):
        Fetcher(CPU).read(ranges)
    (tmp_path / "f").unlink()
    with pytest.raises(IntegrityError, match="f: no such file"):
        Fetcher(CPU).read(ranges)

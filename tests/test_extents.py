"""Extents: every element of every chunk is claimed once, whatever way a tensor is cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_convert.containers import DTYPE_BYTES, Chunk
from gptoss_convert.errors import InputError, IntegrityError
from gptoss_convert.layouts.extents import Extent, disjoint, extents, overlap, volume
from gptoss_convert.layouts.model import load_model
from gptoss_convert.layouts.table_files import load_table
from gptoss_convert.layouts.tables import Tensor

SIZES = load_model().sizes(
    {
        "num_hidden_layers": 2,
        "num_local_experts": 3,
        "vocab_size": 5,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 2,
    }
)
QKV = "decoder.layers.self_attention.linear_qkv.bias"


def tensor(format: str, variant: str, name: str) -> Tensor:
    return next(t for t in load_table(format).tensors(variant, SIZES) if t.name == name)


def whole(tensor: Tensor, offset: int = 0) -> Chunk:
    origin = (0,) * len(tensor.shape)
    return Chunk(tensor.name, tensor.dtype, tensor.shape, origin, tensor.shape, "f", offset)


def elements(extent: Extent) -> list[int]:
    """The byte offset of every element of an extent, slowest axis first."""
    return [
        extent.origin + sum(i * step for i, step in zip(index, extent.strides, strict=True))
        for index in product(*(range(lo, hi) for lo, hi in extent.box))
    ]


@pytest.mark.parametrize(
    ("format", "variant", "name"),
    [
        ("megatron", "stacked", QKV),
        ("megatron", "stacked", "decoder.layers.mlp.experts.experts.linear_fc1.bias"),
        ("openai", "mxfp4", "block.1.attn.qkv.bias"),
        ("hf", "bf16", "model.layers.1.self_attn.q_proj.bias"),
    ],
)
@given(st.data())
def test_a_chunk_is_claimed_element_by_element(
    format: str, variant: str, name: str, data: st.DataObject
):
    known = tensor(format, variant, name)
    cuts = [
        sorted({0, length, data.draw(st.integers(0, length)), data.draw(st.integers(0, length))})
        for length in known.shape
    ]
    offset, chunks = 0, []
    for box in product(*(pairwise(places) for places in cuts)):
        start = tuple(lo for lo, _ in box)
        extent = tuple(hi - lo for lo, hi in box)
        chunks.append(replace(whole(known), start=start, extent=extent, offset=offset))
        offset += chunks[-1].nbytes
    found = extents("x", [known], chunks)
    claimed = sorted(at for extent in found for at in elements(extent))
    assert claimed == list(range(0, offset, DTYPE_BYTES["BF16"]))
    for param in known.rule.params:
        boxes = [extent.box for extent in found if extent.param == param]
        total = np.prod([SIZES[axis] for axis in load_model().params[param]])
        expected = total if "layer" not in known.bound else total // SIZES["layer"]
        assert disjoint(boxes)
        assert sum(map(volume, boxes)) == expected


def test_a_whole_tensor_is_one_extent_a_parameter():
    found = extents(
        "x", [tensor("megatron", "stacked", QKV)], [whole(tensor("megatron", "stacked", QKV))]
    )
    q, k, v = found
    assert [e.param for e in found] == ["attention.q.bias", "attention.k.bias", "attention.v.bias"]
    assert q.box == ((0, 2), (0, 4), (0, 3), (0, 2))
    row, group = 4 * (3 + 1 + 1) * 2 * 2, (3 + 1 + 1) * 2 * 2
    assert q.strides == (row, group, 4, 2)
    assert (k.strides, v.strides) == ((row, group, 2), (row, group, 2))
    assert (q.origin, k.origin, v.origin) == (0, 12, 16)


def test_where_an_extent_begins_and_how_far_it_reaches():
    (extent,) = extents(
        "x",
        [tensor("hf", "bf16", "model.norm.weight")],
        [whole(tensor("hf", "bf16", "model.norm.weight"), 100)],
    )
    assert extent.at(((3, 5),)) == 106
    assert extent.span(((3, 5),)) == 4


def test_overlap_is_the_common_part():
    assert overlap(((0, 4), (2, 6)), ((3, 9), (0, 3))) == ((3, 4), (2, 3))
    assert overlap(((0, 4), (2, 6)), ((4, 9), (0, 3))) is None


BOX = st.tuples(*[st.tuples(st.integers(0, 4), st.integers(1, 3))] * 2)


@given(st.lists(BOX, max_size=6))
def test_disjoint_means_that_no_cell_is_covered_twice(spans: list[tuple[tuple[int, int], ...]]):
    boxes = [tuple((lo, lo + length) for lo, length in span) for span in spans]
    cover = np.zeros((8, 8), int)
    for (a, b), (c, d) in boxes:
        cover[a:b, c:d] += 1
    assert disjoint(boxes) == bool((cover < 2).all())


def test_unknown_missing_and_misshapen_tensors_are_named():
    known = list(load_table("hf").tensors("bf16", SIZES))
    chunks = [whole(t) for t in known]
    with pytest.raises(IntegrityError) as refused:
        extents("dir", known, chunks[2:])
    assert str(refused.value) == (
        "dir: 2 tensors missing: model.embed_tokens.weight, model.layers.0.input_layernorm.weight"
    )
    with pytest.raises(IntegrityError) as refused:
        extents("dir", known[1:], chunks)
    assert str(refused.value) == (
        "dir: 1 unknown tensors: model.embed_tokens.weight; --drop PATTERN leaves out what is not "
        "the model's"
    )
    chunks[0] = replace(chunks[0], shape=(32, 5), extent=(32, 5))
    with pytest.raises(InputError) as refused:
        extents("dir", known, chunks)
    assert str(refused.value) == (
        "dir: model.embed_tokens.weight: layout 'vocab hidden' expects shape (5, 32), found (32, 5)"
    )


def test_wider_floats_pass_where_casts_are_allowed_and_bytes_never():
    known = tensor("hf", "bf16", "model.norm.weight")
    wide = replace(whole(known), dtype="F32")
    with pytest.raises(InputError, match=r"expects dtype BF16, found F32; pass --cast"):
        extents("x", [known], [wide])
    (extent,) = extents("x", [known], [wide], frozenset(("F32",)))
    assert (extent.dtype, extent.strides) == ("F32", (4,))
    packed = tensor("hf", "mxfp4", "model.layers.0.mlp.experts.down_proj_scales")
    with pytest.raises(InputError, match=r"expects dtype U8, found F32"):
        extents("x", [packed], [replace(whole(packed), dtype="F32")], frozenset(("F32",)))

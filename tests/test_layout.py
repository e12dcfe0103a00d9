"""Layout strings: what parses, what is refused, and the shapes and places that follow."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptoss_convert.errors import InputError
from gptoss_convert.layouts.layout import AxisPlace, Layout, interval_boxes, shape_of

SIZES = {"expert": 3, "inter": 4, "glu": 2, "hidden": 5, "kv_head": 7, "group": 6}


def test_a_parenthesis_joins_axes_into_one_dimension():
    layout = Layout.parse("expert (inter glu)  hidden")
    assert layout.dims == (("expert",), ("inter", "glu"), ("hidden",))
    assert layout.axes == ("expert", "inter", "glu", "hidden")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("expert [inter]", "layout 'expert [inter]': unexpected character at 7"),
        ("Expert", "layout 'Expert': unexpected character at 1"),
        ("((inter))", "layout '((inter))': parentheses do not nest"),
        ("inter)", "layout 'inter)': ')' closes nothing"),
        ("()", "layout '()': ')' closes nothing"),
        ("(inter glu", "layout '(inter glu': '(' is never closed"),
        ("inter (glu inter)", "layout 'inter (glu inter)': axis 'inter' appears twice"),
        ("* (* hidden)", "layout '* (* hidden)': axis '*' appears twice"),
        ("  ", "layout '': a tensor has at least one dimension"),
    ],
)
def test_a_bad_layout_is_refused_with_its_text(text: str, message: str):
    with pytest.raises(InputError) as refused:
        Layout.parse(text)
    assert str(refused.value) == message


def test_places_follow_from_the_order_of_the_axes():
    layout = Layout.parse("expert hidden (inter glu)")
    shape, (placement,) = shape_of(layout, {"w": ["expert", "inter", "glu", "hidden"]}, SIZES)
    assert shape == (3, 5, 8)
    assert placement.places == (
        AxisPlace(0, 1),
        AxisPlace(2, 2),
        AxisPlace(2, 1),
        AxisPlace(1, 1),
    )


def test_an_axis_that_the_name_binds_has_no_place():
    _, (placement,) = shape_of(
        Layout.parse("hidden"), {"w": ["expert", "hidden"]}, SIZES, ["expert"]
    )
    assert placement.places == (None, AxisPlace(0, 1))


def test_parameters_lie_behind_each_other_along_the_star():
    params = {"q": ["kv_head", "group", "hidden"], "k": ["kv_head", "hidden"]}
    shape, (q, k) = shape_of(Layout.parse("(kv_head *) hidden"), params, SIZES)
    assert shape == (7 * (6 + 1), 5)
    assert q.star == (0, 1, 0, 6)
    assert k.star == (0, 1, 6, 1)
    assert q.places == (AxisPlace(0, 7), AxisPlace(0, 1), AxisPlace(1, 1))
    assert (q.star_axes, k.star_axes) == (("group",), ())


def test_an_axis_inside_the_star_makes_steps_of_the_star_longer():
    _, (q, k) = shape_of(
        Layout.parse("(* hidden)"), {"q": ["kv_head", "hidden"], "k": ["hidden"]}, SIZES
    )
    assert q.star == (0, 5, 0, 7)
    assert k.star == (0, 5, 7, 1)
    assert q.places == (AxisPlace(0, 5), AxisPlace(0, 1))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.data())
def test_boxes_cover_an_interval_once_and_in_order(sizes: list[int], data: st.DataObject):
    flat = np.arange(math.prod(sizes)).reshape(sizes)
    start = data.draw(st.integers(0, flat.size))
    stop = data.draw(st.integers(start, flat.size))
    covered = [
        flat[tuple(slice(lo, hi) for lo, hi in box)].ravel()
        for box in interval_boxes(start, stop, sizes)
    ]
    assert [int(i) for part in covered for i in part] == [*range(start, stop)]
    assert len(covered) <= 2 * len(sizes) - 1

"""Folded names: long lists of tensors in a few words."""

from __future__ import annotations

from itertools import product

from gptoss_convert.layouts.folding import fold, ranges


def test_numbers_fold_into_ranges():
    assert ranges([3, 1, 2, 0, 7, 9, 8]) == "0..3,7..9"
    assert ranges([5]) == "5"
    assert ranges([]) == ""


def test_layers_and_experts_fold_into_ranges():
    names = [f"model.layers.{n}.mlp.{e}.w" for n, e in product(range(36), (0, 1, 5))]
    assert fold(names) == "model.layers.{0..35}.mlp.{0..1,5}.w"


def test_a_number_that_all_names_share_stays_plain():
    assert fold(["block.7.a", "block.7.a", "norm.scale"]) == "block.7.a, norm.scale"


def test_digits_inside_a_word_are_no_index():
    assert fold(["mlp1_weight.blocks", "mlp2_weight.blocks"]) == (
        "mlp1_weight.blocks, mlp2_weight.blocks"
    )


def test_the_layers_of_an_uneven_set_are_not_claimed_for_every_expert():
    assert fold(["l.0.e.0.w", "l.1.e.1.w"]) == "l.0.e.0.w, l.1.e.1.w"


def test_a_name_with_braces_is_shown_as_it_is():
    assert fold(["a{}.1.b", "a{}.2.b"]) == "a{}.{1..2}.b"


def test_more_groups_than_the_limit_are_counted():
    assert fold("abcdef", limit=2) == "a, b and 4 more groups"

"""Layouts: parsing, sizes and places, against index arithmetic written out by hand."""

import numpy as np
import pytest

from vrscope.arch.layout import Concat, Leaf, Repeat, choose, leaves, length, parse_layout
from vrscope.arch.positions import positions
from vrscope.errors import FamilyError

AXES = {"q": ("g", "r", "d"), "k": ("g", "d"), "v": ("g", "d"), "gate": ("F",), "up": ("F",), "e": ("x", "F")}
SIZES = {"g": 2, "r": 3, "d": 4, "h": 6, "F": 5, "x": 2}


def test_parses_names_concatenation_repetition_and_alternatives():
    assert parse_layout("q", "here") == Leaf(("q",))
    assert parse_layout(" q | k|v ", "here") == Concat((Leaf(("q",)), Leaf(("k",)), Leaf(("v",))))
    assert parse_layout("g*(r*q|k|v)", "here") == Repeat(
        "g", Concat((Repeat("r", Leaf(("q",))), Leaf(("k",)), Leaf(("v",))))
    )
    assert [leaf.names for leaf in leaves(parse_layout("h*(q0,q|k0,k|v)", "here"))] == [
        ("q0", "q"),
        ("k0", "k"),
        ("v",),
    ]
    assert leaves(parse_layout("eup{x}", "here"))[0].names == ("eup{x}",)


@pytest.mark.parametrize("text", ["", "q|", "|q", "(q", "q)", "2*q", "q k", "n*", "q-k"])
def test_refuses_what_is_not_a_layout(text):
    with pytest.raises(FamilyError, match="here"):
        parse_layout(text, "here")


@pytest.mark.parametrize(
    ("text", "size"),
    [("q", 24), ("k", 8), ("q|k|v", 40), ("g*(r*q|k|v)", 40), ("h*(q)", 24), ("gate|up", 10), ("F*(gate|up)", 10)],
)
def test_length(text, size):
    assert length(parse_layout(text, "here"), AXES, SIZES) == (size, {})


def test_length_names_the_axis_that_is_not_known():
    known = {axis: size for axis, size in SIZES.items() if axis != "F"}
    assert length(parse_layout("gate|up", "here"), AXES, known) == (0, {("F",): 2})
    assert length(parse_layout("F*(gate|up)", "here"), AXES, known) == (0, {("F",): 2})


def test_places_of_a_group_interleaved_qkv():
    """Falcon's layout: for each KV group its query heads, then k, then v."""
    places = positions(parse_layout("g*(r*q|k|v)", "here"), AXES, SIZES)
    group = (3 + 1 + 1) * 4
    for g in range(2):
        for r in range(3):
            assert places["q"][g, r].tolist() == list(range(g * group + r * 4, g * group + r * 4 + 4))
        assert places["k"][g].tolist() == list(range(g * group + 12, g * group + 16))
        assert places["v"][g].tolist() == list(range(g * group + 16, g * group + 20))


def test_places_of_per_head_and_element_interleaving():
    heads = {"q": ("g", "r", "d"), "k": ("g", "r", "d"), "v": ("g", "r", "d")}
    places = positions(parse_layout("h*(q|k|v)", "here"), heads, SIZES)
    assert places["k"][1, 2].tolist() == [5 * 12 + 4 + n for n in range(4)]
    pairs = positions(parse_layout("F*(gate|up)", "here"), AXES, SIZES)
    assert pairs["gate"].tolist() == [0, 2, 4, 6, 8] and pairs["up"].tolist() == [1, 3, 5, 7, 9]


def test_places_cover_a_dimension_exactly_once():
    for text in ("q|k|v", "g*(r*q|k|v)", "h*(q)|k|v"):
        places = positions(parse_layout(text, "here"), AXES, SIZES)
        everything = np.concatenate([place.reshape(-1) for place in places.values()])
        assert sorted(everything.tolist()) == list(range(40))


def test_stacked_experts_repeat_their_places():
    places = positions(parse_layout("e", "here"), AXES, SIZES, ("x",))
    assert places["e"].tolist() == [list(range(5))] * 2


def test_choose_reduces_alternatives():
    layout = choose(parse_layout("h*(q0,q|v)", "here"), lambda names: names[-1])
    assert [leaf.names for leaf in leaves(layout)] == [("q",), ("v",)]

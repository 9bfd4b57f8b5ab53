"""A sweep is data: product, zip and chain over override dicts."""

import pytest

from experiments.sweep import axis, cell_id, chain, product, together
from research.errors import InputError


def test_product_takes_every_combination_and_later_axes_win():
    cells = product(axis("optim.lr=1e-3,3e-3"), axis("seed=0,1,2"), [{"seed": "7"}])
    assert len(cells) == 6 and {cell["seed"] for cell in cells} == {"7"}
    assert product(axis("a=1,2"), axis("b=3")) == [{"a": "1", "b": "3"}, {"a": "2", "b": "3"}]


def test_together_pairs_and_refuses_other_lengths():
    assert together(axis("a=1,2"), axis("b=3,4")) == [{"a": "1", "b": "3"}, {"a": "2", "b": "4"}]
    with pytest.raises(InputError, match="--together: fields have .1, 2. values"):
        together(axis("a=1,2"), axis("b=3"))


def test_chain_keeps_order_and_drops_repeats():
    assert chain([{"a": 1}, {"b": 2}], [{"a": 1}, {"a": 2}]) == [{"a": 1}, {"b": 2}, {"a": 2}]


def test_a_cell_is_known_by_its_overrides_in_any_order():
    assert cell_id({"a": 1, "b": 2}) == cell_id({"b": 2, "a": 1}) != cell_id({"a": 1, "b": 3})


@pytest.mark.parametrize("text", ["optim.lr", "=3", "optim.lr="])
def test_an_axis_needs_a_key_and_values(text):
    with pytest.raises(InputError, match="--vary"):
        axis(text)

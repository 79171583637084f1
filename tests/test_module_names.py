import pytest

from peft_quant.module_names import natural_order, split_block


def test_numbers_are_ordered_as_numbers():
    names = ["layers.10.q_proj", "layers.9.q_proj", "layers.9.k_proj", "norm"]
    assert sorted(names, key=natural_order) == ["layers.9.k_proj", "layers.9.q_proj", "layers.10.q_proj", "norm"]


@pytest.mark.parametrize("number", ("²", "٣", "9" * 5000))
def test_names_with_other_numbers(number):
    assert sorted([f"layers.{number}.q_proj", "layers.1.q_proj"], key=natural_order)[0] == "layers.1.q_proj"
    split_block(f"layers.{number}.q_proj")

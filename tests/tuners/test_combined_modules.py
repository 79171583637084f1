"""`modules_to_save` of adapters that are combined."""

import pytest
import torch
from gptq_models import PlainMLP
from peft import get_peft_model


def heads(model):
    return model.base_model.model.head.modules_to_save


@pytest.mark.parametrize("order", (["default", "other"], ["other", "default"]))
def test_a_module_of_one_of_them_is_taken_over_as_trained(method, order):
    model = get_peft_model(PlainMLP(), method.config(changed=True, modules_to_save=["head"]))
    with torch.no_grad():
        heads(model)["default"].weight.mul_(2)
    model.add_adapter("other", method.config(changed=True))
    model.add_weighted_adapter(order, [1.0, 1.0], "sum", combination_type="linear")
    assert sorted(heads(model)) == ["default", "sum"]
    assert torch.equal(heads(model)["sum"].weight, heads(model)["default"].weight)
    assert heads(model)["sum"].weight is not heads(model)["default"].weight
    assert [model.peft_config[name].modules_to_save for name in ("default", "other", "sum")] == [
        ["head"],
        None,
        ["head"],
    ]
    model.set_adapter("sum")
    model(torch.randn(2, 64))


def test_a_module_of_both_is_refused_before_anything_changes(method):
    model = get_peft_model(PlainMLP(), method.config(changed=True, modules_to_save=["head"]))
    model.add_adapter("other", method.config(changed=True, modules_to_save=["head"]))
    with pytest.raises(ValueError, match=r"same module with modules_to_save, but found 1 such instance\(s\)"):
        model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="linear")
    assert sorted(model.peft_config) == ["default", "other"]

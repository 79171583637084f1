import json

import pytest

from peft_quant import InvalidFileError
from peft_quant.evaluation.loading import adapter_base, quantization_of


@pytest.fixture
def adapter(tmp_path):
    def write(content):
        (tmp_path / "adapter_config.json").write_text(content)
        return tmp_path

    return write


def test_the_base_that_an_adapter_names(adapter, checkpoint):
    assert adapter_base(adapter(json.dumps({"base_model_name_or_path": "user/base"}))) == "user/base"
    assert adapter_base(checkpoint) is None


@pytest.mark.parametrize("base", [None, "", 1, ["user/base"]])
def test_adapters_that_name_none(adapter, base):
    with pytest.raises(ValueError, match="does not name its base"):
        adapter_base(adapter(json.dumps({"base_model_name_or_path": base})))


def test_damaged_files(adapter, tmp_path):
    with pytest.raises(InvalidFileError, match=r"adapter_config\.json holds a NoneType"):
        adapter_base(adapter("null"))
    (tmp_path / "config.json").write_text("2")
    with pytest.raises(InvalidFileError, match=r"config\.json holds a int"):
        quantization_of(tmp_path)

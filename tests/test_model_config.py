import json

import pytest

from peft_quant import InvalidFileError
from peft_quant.model_config import read_model_config


def test_from_a_directory_or_its_file(checkpoint):
    assert read_model_config(checkpoint).hidden_size == 64
    assert read_model_config(checkpoint / "config.json").hidden_size == 64


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "config.json holds a list"),
        ("{", "config.json is not JSON"),
        ({"model_type": "none-such"}, "cannot use the config of .*ValueError: .*none-such"),
        ({"model_type": "llama", "hidden_size": []}, "cannot use the config of .*hidden_size"),
        ({"model_type": []}, "cannot use the config of .*TypeError"),
    ],
)
def test_damage_names_the_config(tmp_path, content, message):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InvalidFileError, match=message):
        read_model_config(tmp_path)


def test_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        read_model_config(tmp_path)
    with pytest.raises(OSError, match="couldn't find them in the cached files"):
        read_model_config("nobody/nothing")

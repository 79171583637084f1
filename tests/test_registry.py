import copy
import importlib
import json
import pickle
import subprocess
import sys
import warnings
from importlib.metadata import PackageNotFoundError

import pytest
from peft import LoraConfig, PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

import peft_quant
from peft_quant import registry
from peft_quant.compat import NEWEST_TESTED, warn_of_untested_versions


def test_the_member_is_a_real_one():
    member = PeftType.PEQA
    assert PeftType("PEQA") is PeftType["PEQA"] is member
    assert (member.name, member.value, str(member.value)) == ("PEQA", "PEQA", "PEQA")
    assert member in list(PeftType)
    assert member == "PEQA"
    assert isinstance(member, PeftType)
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member


def test_registering_again_changes_nothing():
    members = list(PeftType)
    assert registry.add_peft_type("PEQA") is PeftType.PEQA
    registry.register("peqa", peft_quant.PEQAConfig, peft_quant.PEQAModel)
    importlib.reload(peft_quant)
    assert list(PeftType) == members


def test_a_method_that_peft_ships_itself_is_left_alone():
    with pytest.raises(RuntimeError, match=r"method named LORA already \(peft\.tuners\.lora"):
        registry.register("lora", peft_quant.PEQAConfig, peft_quant.PEQAModel)
    assert PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is LoraConfig


def test_configs_are_found_by_type(tmp_path):
    peft_quant.PEQAConfig(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is peft_quant.PEQAConfig


@pytest.mark.parametrize(
    ("installed", "accepted"), (("0.19.1", False), ("0.20.0", True), ("0.21.9", True), ("0.22.0", False))
)
def test_only_tested_versions_of_peft_are_accepted(monkeypatch, installed, accepted):
    monkeypatch.setattr("peft_quant.compat.version", lambda _: installed)
    if accepted:
        peft_quant.require_supported_peft()
    else:
        with pytest.raises(ImportError, match=f"found {installed}"):
            peft_quant.require_supported_peft()


@pytest.mark.parametrize(
    ("package", "installed", "warned"),
    (
        ("torch", "2.14.3+cu130", False),
        ("torch", "2.15.0.dev20261101", True),
        ("gptqmodel", "7.8.0", True),
        ("gptqmodel", None, False),
        ("transformers", "6.0.0", True),
        ("transformers", "5.24.9", False),
    ),
)
def test_versions_newer_than_tested_are_warned_of(monkeypatch, package, installed, warned):
    def version(name):
        if name == package and installed is None:
            raise PackageNotFoundError(name)
        return installed if name == package else NEWEST_TESTED[name]

    monkeypatch.setattr("peft_quant.compat.version", version)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        warn_of_untested_versions()
    messages = [str(warning.message) for warning in caught]
    if warned:
        (message,) = messages
        assert f"not tested with {package} {installed} (tested up to {NEWEST_TESTED[package]})" in message
    else:
        assert not messages


CONFIGS = (peft_quant.PEQAConfig, peft_quant.LRECConfig)

UNREGISTERED = """
import sys
from peft import PeftConfig
for directory in sys.argv[1:]:
    try:
        PeftConfig.from_pretrained(directory)
    except KeyError as error:
        print(error)
assert "peft_quant" not in sys.modules
"""


@pytest.mark.parametrize("config_class", CONFIGS)
def test_a_saved_config_names_this_package_and_the_version_that_made_it(config_class, tmp_path):
    config_class(task_type="CAUSAL_LM").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    assert saved["peft_quant_version"] == peft_quant.__version__
    path.write_text(json.dumps({**saved, "peft_quant_version": "0.0.1"}))
    assert PeftConfig.from_pretrained(tmp_path).peft_quant_version == "0.0.1"


def test_without_this_package_peft_names_the_method_alone(tmp_path):
    # what PEFT 0.20 and 0.21 do with an unknown method, and the entry of README's table: a KeyError
    directories = [tmp_path / config_class.__name__ for config_class in CONFIGS]
    for config_class, directory in zip(CONFIGS, directories):
        config_class().save_pretrained(directory)
    result = subprocess.run(
        [sys.executable, "-c", UNREGISTERED, *map(str, directories)], capture_output=True, text=True, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["'PEQA'", "'LREC'"]

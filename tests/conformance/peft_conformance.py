"""Pytest plugin that runs PEFT's own tests on one method (`--method`) and on GPTQ models.

It writes nothing into PEFT's test files: it rewrites what they hold once imported. Rows of other methods and tests of
what GPTQ layers cannot be (convolutions, embeddings, DoRA...) are dropped, hub ids become local models where there is
one, and a test that would need a hub for more is skipped.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import stand_ins
import torch
from expected import expected_failures
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftConfig
from transformers import AutoModelForCausalLM

from peft_quant import LRECConfig, PEQAConfig, hotswap_adapter


TESTS = {
    "test_custom_models": None,
    "test_decoder_models": None,
    "test_config": None,
    "test_low_level_api": None,
    "test_tuners_utils": ("TestRankAndAlphaPattern",),
    "test_initialization": ("TestHotSwapping", "TestScaling"),
}
"""Files, and their classes where not all are of use."""

NO_GPTQ = re.compile(
    r"(?i)conv[123]d|modelemb|embedding_layer|resized_emb|lora_embed|mha|multihead|adalora|embed_tokens|unsupported_layer|batchnorm|"
    r"dora|trainable_token|trainble_token|target_param|layer_replication|custom_(module|lora)|mixed=|prompt|"
    r"stable_?diffusion|timing|monteclora|pvera|gpt2|gemma|(?<!\w)(?!lora|peft|auto)[a-z0-9]+config\("
)
"""What a test has in its name or source that is not about linear layers or belongs to another method."""

DEFAULT_NAMES = re.compile("test_default_target_modules_(not_set|list_of_str|str)")
"""Tests of names of targets by architecture, which PEFT runs on no method with a default of its own."""

DEFAULT_ALL_LINEAR = "test_default_target_modules_osf"
"""PEFT's test of OSF's default, which is ours: every linear layer."""

NO_PEQA = re.compile(r"(?i)lora_[ab]\b|lora_bias|\"lora_?\"|rank|scaling|svd|lora\.|LoraLayer|compiled_hotswap|[( ]r=")
"""What a test has that only LoRA's matrices have."""

LORA_MODEL = re.compile(r"LoraConfig|get_lora_model|self, model")
"""How a test that has no configuration among its parameters gets a model with LoRA."""

ROWS = {"config_kwargs", "config0", "mandatory_kwargs"}
"""Parameters of tests that run on every method, and mention others in their source."""

LOCAL = {
    "peft-internal-testing/opt-125m": stand_ins.DEEP_OPT,
    "peft-internal-testing/tiny-random-OPTForCausalLM": stand_ins.OPT,
    "trl-internal-testing/tiny-random-LlamaForCausalLM": stand_ins.LLAMA,
}


def peqa_config(**options: Any) -> PEQAConfig:
    """PEQA's configuration for a test that asks for LoRA's."""
    if "init_lora_weights" in options:
        options["init_weights"] = options.pop("init_lora_weights")
    known = {option.name for option in fields(PEQAConfig)}
    return PEQAConfig(**{name: value for name, value in options.items() if name in known})


METHODS = {
    "peqa": (PEQAConfig, peqa_config, {"init_weights": False}),
    "lrec": (LRECConfig, LRECConfig, {"init_lora_weights": False}),
    "lora": (LoraConfig, LoraConfig, {"init_lora_weights": False}),
}
"""Config class, what stands for `LoraConfig(...)`, and how not to start from zero."""


class NotOursError(Exception):
    """A parameter of PEFT's tests that belongs to another method."""


def ours(value: Any, method: str) -> Any:
    """A parameter of PEFT's tests, with LoRA's configurations replaced by the method's."""
    config_class, make, _ = METHODS[method]
    if value is LoraConfig:
        return config_class
    if type(value) is LoraConfig:
        defaults = LoraConfig()
        options = {f.name: getattr(value, f.name) for f in fields(LoraConfig) if f.name != "peft_type"}
        options = {name: option for name, option in options.items() if option != getattr(defaults, name)}
        try:
            LRECConfig(**options).refuse_other_lora_options()
        except ValueError as error:
            raise NotOursError from error
        return make(**options)
    if isinstance(value, PeftConfig) or (isinstance(value, type) and issubclass(value, PeftConfig)):
        raise NotOursError
    if type(value) in (list, tuple):
        return type(value)(ours(part, method) for part in value)
    if hasattr(value, "marks"):  # pytest.param
        return value._replace(values=tuple(ours(part, method) for part in value.values))
    return value


def rewrite_marks(module: Any, method: str, rows: dict[int, list]) -> None:
    """Give the module's parametrized tests the method's rows: given ones, by the id of PEFT's list, or converted."""
    for cls in [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]:
        for function in [function for function in vars(cls).values() if hasattr(function, "pytestmark")]:
            for mark in function.pytestmark:
                if mark.name == "parametrize":
                    given = rows.get(id(mark.args[1]))
                    values = keep_ours(mark.args[1], method) if given is None else given
                    object.__setattr__(mark, "args", (mark.args[0], values, *mark.args[2:]))
                    if mark.kwargs.get("ids") and len(mark.kwargs["ids"]) != len(values):
                        object.__setattr__(mark, "kwargs", {})


def keep_ours(values: Any, method: str) -> list:
    kept = []
    for value in values:
        try:
            kept.append(ours(value, method))
        except NotOursError:
            continue
    return kept


def custom_rows(method: str) -> list[tuple]:
    config_class = METHODS[method][0]
    both = {"target_modules": ["lin0", "lin1"]}
    rows = {
        "both": both,
        "lin1": {"target_modules": ["lin1"]},
        "regex": {"target_modules": "lin.*"},
        "exclude": {**both, "exclude_modules": ["lin0"]},
        "modules_to_save": {"target_modules": ["lin0"], "modules_to_save": ["lin1"]},
    }
    if method == "peqa":
        rows["bf16 serving"] = {**both, "serving_dtype": "bfloat16"}
    else:
        rows["rslora"] = {**both, "use_rslora": True}
        rows["patterns"] = {**both, "rank_pattern": {"lin0": 3}, "alpha_pattern": {"lin1": 5}}
        rows["dropout"] = {**both, "lora_dropout": 0.1}
    if method != "lora":  # which knows no default for a model that is not one of transformers'
        rows["default"] = {}
        rows["all-linear"] = {"target_modules": "all-linear"}
    return [
        (name, "MLPWithFloatHead" if "modules_to_save" in options else "MLP", config_class, options)
        for name, options in rows.items()
    ]


def change_custom_models(tests: Any, method: str) -> dict[int, list]:
    config_class, _, random_start = METHODS[method]
    first, second = {"target_modules": ["lin0"], **random_start}, {"target_modules": ["lin1"], **random_start}
    both = {"target_modules": ["lin0", "lin1"], **random_start}
    for model in (stand_ins.MLP, stand_ins.MLPWithFloatHead, stand_ins.DeepMLP, stand_ins.MLP_2x_same_shape):
        setattr(tests, model.__name__, model)

    def from_pretrained(model_id: str, dtype: torch.dtype | None = None) -> torch.nn.Module:
        torch.manual_seed(0)
        return getattr(tests, model_id)().to(dtype or torch.float32)

    tests.MockTransformerWrapper.from_pretrained = from_pretrained
    return {
        id(tests.TEST_CASES): custom_rows(method),
        id(tests.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES): [
            ("same", method, config_class, first, first),
            ("different", method, config_class, first, second),
            ("overlapping", method, config_class, first, both),
        ],
    }


def change_decoder_models(tests: Any, method: str) -> dict[int, list]:
    config_class = METHODS[method][0]
    options = {} if method == "peqa" else {"r": 8, "lora_alpha": 32}
    rows = [
        (config_class, {"task_type": "CAUSAL_LM", **options}),
        (config_class, {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"], **options}),
    ]
    return {id(tests.PEFT_DECODER_MODELS_TO_TEST): [stand_ins.LLAMA, stand_ins.OPT], id(tests.ALL_CONFIGS): rows}


def change_config(tests: Any, method: str) -> dict[int, list]:
    tests.PEFT_MODELS_TO_TEST = [(stand_ins.LORA_ADAPTER, "test")]
    return {}


def change_linear_models(tests: Any, method: str) -> dict[int, list]:
    """Models that test classes define become GPTQ ones."""
    tests.nn = stand_ins.GPTQ_NN
    if hasattr(tests, "DummyModel"):
        tests.DummyModel = stand_ins.DummyModel
    return {}


CHANGES = {
    "test_custom_models": change_custom_models,
    "test_decoder_models": change_decoder_models,
    "test_config": change_config,
}


def use_local_models() -> None:
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(model_id: str, *args: Any, **kwargs: Any) -> Any:
        return load(LOCAL.get(model_id, model_id), *args, **kwargs)

    AutoModelForCausalLM.from_pretrained = from_pretrained


def check_modelcard(self: Any, directory: str, model: Any) -> None:
    """PEFT's own wants the base's path for its Hub id, which our cards name if it is one; the stand-ins are local."""
    data = ModelCard.load(Path(directory, "README.md")).data
    assert (data.library_name, data.base_model) == ("peft", None)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except (OSError, ConnectionError) as error:
        if "outgoing traffic has been disabled" in str(error) or "We couldn't connect to" in str(error):
            pytest.skip("needs a model hub")
        raise


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--method", choices=list(METHODS))
    parser.addoption("--outcomes", type=Path, help="JSON file to write")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Outcomes(config.getoption("--outcomes")))


def pytest_sessionstart(session: pytest.Session) -> None:
    method = session.config.getoption("--method")
    utils, common = (importlib.import_module(f"tests.{name}") for name in ("testing_utils", "testing_common"))
    use_local_models()
    modules = [importlib.import_module(f"tests.{name}") for name in TESTS]
    for module in modules:
        change = CHANGES.get(module.__name__.rpartition(".")[2], change_linear_models)
        rewrite_marks(module, method, change(module, method))
    for module in (utils, common, *modules):
        module.hub_online_once = nullcontext
    if method != "lora":
        common.PeftCommonTester.check_modelcard = check_modelcard
    if method == "peqa":  # PEFT's own takes LoRA adapters only
        modules[-1].hotswap_adapter = hotswap_adapter
    if method == "lrec":  # for PEFT's tests it is LoRA, but for merging
        for module in (utils, common, *modules):
            module.LoraConfig = LRECConfig
        skip = partial(pytest.skip, "LREC does not merge")
        for module in (common, importlib.import_module("tests.test_custom_models")):
            module._skip_if_merging_not_supported = lambda *args: skip()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    method = config.getoption("--method")
    kept, dropped = [], []
    for item in items:
        (kept if is_ours(item, method) else dropped).append(item)
    config.hook.pytest_deselected(items=dropped)
    items[:] = kept
    expected = expected_failures(method)
    for item in items:
        for pattern, reason in expected:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(strict=not reason.startswith("rounding"), reason=reason))
                break


def is_ours(item: Any, method: str) -> bool:
    classes = TESTS[item.module.__name__.rpartition(".")[2]]
    if classes is not None and (item.cls is None or item.cls.__name__ not in classes):
        return False
    if method != "lora" and item.name == DEFAULT_ALL_LINEAR:
        return True
    if method != "lora" and DEFAULT_NAMES.match(item.name):
        return False
    parameters = item.callspec.params if hasattr(item, "callspec") else {}
    mentioned = mentions(list(parameters.values()), METHODS[method][0])
    text = item.name if mentioned and ROWS & parameters.keys() else item.name + inspect.getsource(item.function)
    if NO_GPTQ.search(text) or (method == "peqa" and NO_PEQA.search(text)):
        return False
    return mentioned or classes is not None or bool(LORA_MODEL.search(text))


def mentions(value: Any, config_class: type) -> bool:
    if isinstance(value, (list, tuple)):
        return any(mentions(part, config_class) for part in value)
    return value is config_class or isinstance(value, config_class)


@pytest.fixture(autouse=True)
def method_of_the_test(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a single test sees: the method under LoRA's name, and float layers where it trains whole modules.

    Seeded, since some of what is expected is a matter of rounding.
    """
    torch.manual_seed(0)
    config_class, make, _ = METHODS[request.config.getoption("--method")]
    name, module = request.node.originalname, request.module
    common = importlib.import_module("tests.testing_common")
    if config_class is PEQAConfig:
        parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
        if "config_cls" not in parameters:
            monkeypatch.setattr(module, "LoraConfig", make, raising=False)
        if "mixed_adapter_batches" in name:
            for where in (common, module):  # what supports them, by PEFT's lists
                monkeypatch.setattr(where, "LoraConfig", PEQAConfig if "config_cls" in parameters else make)
        if "weighted" in name:
            monkeypatch.setattr(common, "IA3Config", PEQAConfig)  # combines without ranks
    if name == DEFAULT_ALL_LINEAR:
        monkeypatch.setattr(module, "OSFConfig", config_class)
    if "modules_to_save" in name:
        monkeypatch.setattr(stand_ins.MLP, "float_head", True)
        monkeypatch.setattr(stand_ins.DeepMLP, "float_layers", {-1: ("lin1",)})
    if name == "test_set_requires_grad":
        monkeypatch.setattr(stand_ins.DeepMLP, "float_layers", {2: ("lin0",)})


class Outcomes:
    """Writes what became of each test, and the reason of those expected to fail that did."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.outcomes: dict[str, tuple[str, str | None]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            reason = getattr(report, "wasxfail", None)
            self.outcomes[report.nodeid] = ("failed" if reason else report.outcome, reason)

    def pytest_sessionfinish(self) -> None:
        self.path.write_text(json.dumps(self.outcomes), encoding="utf-8")

import re
from dataclasses import replace
from datetime import date

import pytest

from peft_quant.inspection.engines import Packing, engine_verdicts


USUAL = Packing(4, 128, True, False, shapes=frozenset({(4096, 4096), (4096, 11008)}))  # what most checkpoints are
ENGINES = [verdict.engine.split(",")[0].split(" ")[0] for verdict in engine_verdicts(USUAL)]


def verdicts(**changes):
    return dict(zip(ENGINES, engine_verdicts(replace(USUAL, **changes))))


def test_every_row_is_dated_and_sourced():
    for verdict in engine_verdicts(USUAL):
        assert date(2026, 1, 1) < date.fromisoformat(verdict.checked)
        assert verdict.sources
        assert all(source.startswith("https://") or "tests" in source for source in verdict.sources)
        # a file of a branch would say something else tomorrow
        assert not any(re.search(r"/blob/(main|master)/", source) for source in verdict.sources)


def test_the_usual_checkpoint():
    served = {name: (verdict.serves, verdict.option) for name, verdict in verdicts().items()}
    assert served == {
        "transformers": (True, ""),
        "vLLM": (True, ""),
        "SGLang": (True, ""),
        "llama.cpp": (True, ""),
        "LMDeploy": (True, ""),
        "TGI": (True, "`--quantize gptq`"),
        "ExLlamaV2": (True, ""),
        "ExLlamaV3": (None, ""),
    }


@pytest.mark.parametrize(
    ("changes", "engine", "serves", "option"),
    (
        ({"bits": 8}, "vLLM", True, ""),
        ({"bits": 3}, "vLLM", True, "`--quantization humming`"),
        ({"bits": 2, "act_order": True}, "vLLM", False, ""),
        ({"bits": 3, "group_size": -1}, "vLLM", None, ""),
        ({"symmetric": False}, "vLLM", False, ""),
        ({"symmetric": None}, "vLLM", None, ""),
        ({"group_size": 96}, "vLLM", False, ""),
        ({"act_order": True}, "vLLM", True, ""),
        ({"act_order": True, "shapes": frozenset({(576, 192)}), "group_size": 64}, "vLLM", True, "`--dtype float16`"),
        ({"act_order": True, "shapes": frozenset()}, "vLLM", True, "`--dtype float16`"),
        ({"act_order": True, "shapes": frozenset({(576, 192)}), "group_size": -1}, "vLLM", None, ""),
        ({"shapes": frozenset({(576, 192)}), "group_size": 64}, "vLLM", True, "`--dtype float16`"),
        ({"shapes": frozenset()}, "vLLM", True, ""),
        ({"shapes": frozenset({(192, 128)})}, "vLLM", False, ""),
        ({"shapes": frozenset({(192, 128)})}, "SGLang", False, ""),
        ({"bits": 3}, "SGLang", True, "`--dtype float16`"),
        ({"symmetric": False}, "SGLang", True, "`--dtype float16`"),
        (
            {"shapes": frozenset({(576, 192)}), "group_size": 64},
            "SGLang",
            True,
            "`--quantization gptq --dtype float16`",
        ),
        ({"bits": 3}, "llama.cpp", False, ""),
        ({"symmetric": False}, "llama.cpp", True, "zero points as `gptq_v2`"),
        ({"symmetric": False, "checkpoint_format": "gptq_v2"}, "llama.cpp", True, ""),
        ({"bits": 8}, "LMDeploy", False, ""),
        ({"group_size": 64}, "LMDeploy", False, ""),
        ({"act_order": True}, "LMDeploy", False, ""),
        ({"symmetric": None}, "LMDeploy", None, ""),
        ({"checkpoint_format": "gptq_v2"}, "LMDeploy", None, ""),
        ({"bits": 3}, "TGI", None, ""),
        ({"shapes": frozenset()}, "TGI", None, ""),
        ({"shapes": frozenset()}, "SGLang", True, "`--quantization gptq --dtype float16`"),
        ({"shapes": frozenset({(576, 576)}), "group_size": 64}, "TGI", None, ""),
        ({"bits": 8}, "ExLlamaV2", False, ""),
        ({"checkpoint_format": "gptq_v2"}, "ExLlamaV2", None, ""),
    ),
)
def test_what_changes_a_verdict(changes, engine, serves, option):
    verdict = verdicts(**changes)[engine]
    assert (verdict.serves, verdict.option) == (serves, option)
    assert verdict.reason


@pytest.mark.parametrize("changes", ({"bits": None}, {"bits": 5}, {"group_size": None}))
def test_nothing_is_known_of_formats_that_are_not_gptqs(changes):
    assert all(verdict.serves is None for verdict in engine_verdicts(replace(USUAL, **changes)))


def test_from_configs():
    of_a_checkpoint = {"bits": 4, "group_size": 64, "sym": True, "desc_act": False, "format": "gptq_v2"}
    assert Packing.from_config(of_a_checkpoint) == Packing(4, 64, True, False, "gptq_v2")
    of_an_adapter = {"bits": [4, 8], "group_size": 64, "sym": True, "desc_act": False, "checkpoint_format": None}
    assert Packing.from_config(of_an_adapter, [(8, 8)]) == Packing(None, 64, True, False, shapes=frozenset({(8, 8)}))


def test_verdicts_in_words():
    words = {name: str(verdict) for name, verdict in verdicts(bits=3).items()}
    assert words["transformers"] == "yes"
    assert words["SGLang"].startswith("yes, with `--dtype float16`: 2, 3, 4 and 8 bits")
    assert words["llama.cpp"] == "no: 3 bits are not implemented"
    assert words["TGI"].startswith("not known: ")

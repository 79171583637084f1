"""lm-evaluation-harness on an adapter and on what it merges into, over tasks in local files."""

import json

import lm_eval
import pytest
import torch
from gptq_models import load, save_tiny_llama, tiny_tokenizer
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import PeftModel, get_peft_model
from rows import METHODS

from peft_quant import PEQAConfig, merge_checkpoint


CHOICE = """task: choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
PERPLEXITY = """task: perplexity
dataset_path: json
dataset_kwargs: {{data_files: {{test: {path}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: word_perplexity}}]
"""


def words(generator, count):
    return " ".join(f"w{i}" for i in torch.randint(0, 120, (count,), generator=generator).tolist())


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Eight questions of four choices, and four texts."""
    directory = tmp_path_factory.mktemp("tasks")
    generator = torch.Generator().manual_seed(0)
    rows = {
        "choice": [
            {"question": words(generator, 6), "choices": [words(generator, 3) for _ in range(4)], "answer": 0}
            for _ in range(8)
        ],
        "perplexity": [{"text": words(generator, 30)} for _ in range(4)],
    }
    for name, template in (("choice", CHOICE), ("perplexity", PERPLEXITY)):
        path = directory / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows[name]))
        (directory / f"{name}.yaml").write_text(template.format(path=path))
    return TaskManager(include_path=str(directory), include_defaults=False)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = save_tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def adapter(base, method, tmp_path):
    torch.manual_seed(0)
    tuned = get_peft_model(load(base), method.config(changed=True, task_type="CAUSAL_LM"))
    tuned.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def scores(tasks, model):
    """The two metrics, and the log-likelihood of every choice."""
    harness = HFLM(pretrained=model, tokenizer=tiny_tokenizer(), batch_size=2, max_length=64)
    result = lm_eval.simple_evaluate(
        harness, tasks=["choice", "perplexity"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    metrics = [result["results"]["choice"]["acc,none"], result["results"]["perplexity"]["word_perplexity,none"]]
    likelihoods = [value for sample in result["samples"]["choice"] for value, _ in sample["filtered_resps"]]
    return torch.tensor([*metrics, *likelihoods], dtype=torch.float64)


def test_an_adapter_by_name_scores_as_the_model_in_memory(tasks, base, adapter):
    harness = HFLM(pretrained=str(base), peft=str(adapter), dtype="float32", device="cpu", batch_size=2, max_length=64)
    by_name = scores(tasks, harness.model)
    in_memory = scores(tasks, PeftModel.from_pretrained(load(base), adapter).eval())
    torch.testing.assert_close(by_name, in_memory, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(in_memory, scores(tasks, load(base)), rtol=1e-2)


@pytest.mark.parametrize("method", ["PEQA"], indirect=True)
def test_the_merged_checkpoint_scores_as_the_adapter(tasks, base, adapter, tmp_path):
    merged = merge_checkpoint(base, adapter, tmp_path / "merged")
    expected = scores(tasks, PeftModel.from_pretrained(load(base), adapter).eval())
    # gptqmodel's torch kernel multiplies weights in fp16
    torch.testing.assert_close(scores(tasks, load(merged)), expected, rtol=5e-3, atol=0)
    # in the same arithmetic nothing is left to differ
    exact = scores(tasks, get_peft_model(load(merged), PEQAConfig(task_type="CAUSAL_LM")).eval())
    assert torch.equal(exact, expected)

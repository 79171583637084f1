"""Adapters in what transformers offers around a model: pipelines, generation for several adapters, hot-swapping."""

import pytest
import torch
from gptq_models import load, save_tiny_llama, tiny_tokenizer
from peft import PeftModel, get_peft_model
from rows import METHODS
from transformers import pipeline


GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
PROMPTS = ["w10 w11 w12", "w3 w77"]


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A checkpoint with a tokenizer."""
    directory = save_tiny_llama(tmp_path_factory.mktemp("base") / "llama")
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def adapters(base, method, tmp_path):
    """Two adapters that change what the base writes."""
    directories = [tmp_path / "one", tmp_path / "two"]
    for seed, directory in enumerate(directories):
        torch.manual_seed(seed)
        tuned = get_peft_model(load(base), method.config(changed=True, task_type="CAUSAL_LM"))
        tuned.save_pretrained(directory)
    return directories


def tokens(model):
    """What a model writes after each prompt, prompt included."""
    prompts = [tiny_tokenizer()(prompt, return_tensors="pt").input_ids for prompt in PROMPTS]
    return [model.generate(input_ids=prompt, **GREEDY)[0].tolist() for prompt in prompts]


def tuned(base, directory):
    return PeftModel.from_pretrained(load(base), directory).eval()


class TestPipeline:
    @pytest.fixture
    def expected(self, base, adapters):
        expected = tokens(tuned(base, adapters[0]))
        assert expected != tokens(load(base))
        return expected

    def written(self, generate):
        return [generate(prompt, return_tensors=True, **GREEDY)[0]["generated_token_ids"] for prompt in PROMPTS]

    def test_of_a_directory(self, adapters, expected):
        generate = pipeline("text-generation", model=str(adapters[0]), dtype=torch.float32)
        assert self.written(generate) == expected

    def test_of_a_model(self, base, adapters, expected):
        model = tuned(base, adapters[0])
        generate = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
        assert self.written(generate) == expected


def test_generation_for_several_adapters_in_one_batch(base, adapters, input_ids):
    model = tuned(base, adapters[0])
    model.load_adapter(adapters[1], "other")
    prompt = input_ids[:1, :4]
    expected = []
    for name in ("default", "other"):
        model.set_adapter(name)
        expected.append(model.generate(input_ids=prompt, **GREEDY))
    with model.disable_adapter():
        expected.append(model.generate(input_ids=prompt, **GREEDY))
    assert len({tuple(row[0].tolist()) for row in expected}) == 3
    names = ["default", "other", "__base__"]
    together = model.generate(input_ids=prompt.repeat(3, 1), adapter_names=names, **GREEDY)
    assert torch.equal(together, torch.cat(expected))


def test_native_hotswapping_is_refused(base, adapters, input_ids):
    # `hotswap_adapter` swaps in a PeftModel, and `export_lora` makes LREC's adapter one that transformers swaps
    model = load(base)
    model.load_adapter(str(adapters[0]), adapter_name="task")
    expected = model(input_ids=input_ids).logits
    with pytest.raises(ValueError, match="only supported for LoRA"):
        model.load_adapter(str(adapters[1]), adapter_name="task", hotswap=True)
    assert torch.equal(model(input_ids=input_ids).logits, expected)

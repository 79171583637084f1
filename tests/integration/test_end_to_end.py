"""From a float model to a merged checkpoint served by a process that has never heard of peft_quant."""

import os
import subprocess
import sys

import pytest
import torch
from gptq_models import load, tiny_config, tiny_tokenizer
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig, LlamaForCausalLM

from peft_quant import PEQAConfig, gptq, merge_checkpoint
from peft_quant.gptq.quantize import quantize_checkpoint


SERVE = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
with torch.no_grad():
    logits = model(load_file(sys.argv[2])["input_ids"]).logits
assert "peft_quant" not in sys.modules
save_file({"logits": logits}, sys.argv[3])
"""


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("float") / "llama"
    tiny_tokenizer().save_pretrained(directory)
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config(num_hidden_layers=1)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(0)
    return [" ".join(f"w{i}" for i in torch.randint(0, 120, (40,), generator=generator).tolist()) for _ in range(8)]


@torch.no_grad()
def logits(model, input_ids):
    return model(input_ids=input_ids).logits


@pytest.mark.parametrize(("bits", "symmetric", "declared"), ((4, True, "gptq"), (3, False, "gptq_v2")))
def test_quantize_tune_merge_serve(float_model, texts, tmp_path, input_ids, bits, symmetric, declared):
    base = quantize_checkpoint(float_model, tmp_path / "base", texts, bits=bits, group_size=32, symmetric=symmetric)
    model = load(base, bits)
    assert model.config.quantization_config.format == declared
    packed = {gptq.read_format(layer) for layer in model.modules() if gptq.is_packed(layer)}
    assert {(p.bits, p.symmetric) for p in packed} == {(bits, symmetric)}

    # closer to the float model than a model of another seed could be: the zero points are where they should be
    reference = logits(AutoModelForCausalLM.from_pretrained(float_model, dtype=torch.float32), input_ids)
    error = (logits(model, input_ids) - reference).norm() / reference.norm()
    assert error < {4: 0.3, 3: 0.6}[bits]

    tuned = get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    tuned.save_pretrained(tmp_path / "adapter")
    expected = logits(tuned, input_ids)
    merge_checkpoint(base, tmp_path / "adapter", tmp_path / "merged")

    save_file({"input_ids": input_ids}, tmp_path / "input.safetensors")
    arguments = [tmp_path / name for name in ("merged", "input.safetensors", "output.safetensors")]
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", SERVE, *arguments], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    served = load_file(tmp_path / "output.safetensors")["logits"]
    # the engine rounds weights (and at 4 bits, by its CPU kernel, activations) to 16 bits
    torch.testing.assert_close(served, expected, rtol=0, atol=0.03 * expected.abs().max().item())


def test_a_model_quantized_in_this_process_can_be_tuned_at_once(float_model, texts, input_ids):
    quantizer = GPTQConfig(
        bits=4, group_size=32, dataset=texts, tokenizer=str(float_model), backend="gptq_torch", sym=False
    )
    model = AutoModelForCausalLM.from_pretrained(float_model, quantization_config=quantizer, dtype=torch.float32)
    expected = logits(model.eval(), input_ids)
    tuned = get_peft_model(model, PEQAConfig(task_type="CAUSAL_LM")).eval()
    torch.testing.assert_close(logits(tuned, input_ids), expected, rtol=0, atol=0.01 * expected.abs().max().item())

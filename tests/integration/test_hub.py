"""Models and adapters by Hub id, through the real client, against a server on loopback."""

import pytest
import torch
from gptq_models import load, tiny_config
from hub_client import fresh_client, run
from hub_server import serve
from peft import PeftConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from peft_quant import LRECConfig, PEQAConfig, export_lora, initialize_lrec_weights, merge_checkpoint


@pytest.fixture
def hub(checkpoint, tmp_path):
    """Environment of a fresh client of a hub with a base model and an adapter, and the adapter's logits."""
    adapter = tmp_path / "adapter"
    tuned = get_peft_model(load(checkpoint), PEQAConfig(task_type="CAUSAL_LM", init_weights=False)).eval()
    tuned.peft_config["default"].base_model_name_or_path = "user/base"
    tuned.save_pretrained(adapter)
    with serve({"user/base": checkpoint, "user/adapter": adapter}) as endpoint:
        yield fresh_client(endpoint, tmp_path), tuned


LOAD = """
import sys
import peft_quant
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from transformers import GPTQConfig

kernel = GPTQConfig(bits=4, backend="gptq_torch")
model = AutoPeftModelForCausalLM.from_pretrained("user/adapter", quantization_config=kernel, dtype=torch.float32)
with torch.no_grad():
    save_file({"logits": model(load_file(sys.argv[1])["input_ids"]).logits}, sys.argv[2])
"""

MERGE = "import sys, peft_quant; peft_quant.merge_checkpoint('user/base', 'user/adapter', sys.argv[1])"

EXPORT = "import sys, peft_quant; peft_quant.export_lora('user/adapter', sys.argv[1])"

START = """
import sys
import peft_quant
from peft import get_peft_model
from transformers import AutoModelForCausalLM, GPTQConfig

kernel = GPTQConfig(bits=4, backend="gptq_torch")
model = AutoModelForCausalLM.from_pretrained("user/base", quantization_config=kernel, dtype="float32")
model = get_peft_model(model, peft_quant.LRECConfig(task_type="CAUSAL_LM", r=4))
peft_quant.initialize_lrec_weights(model, "user/float", "svd")
model.save_pretrained(sys.argv[1])
"""


def test_an_adapter_and_its_base_load_by_id(hub, tmp_path, input_ids):
    environment, tuned = hub
    save_file({"input_ids": input_ids}, tmp_path / "input.safetensors")
    result = run(LOAD, environment, tmp_path / "input.safetensors", tmp_path / "output.safetensors")
    assert result.returncode == 0, result.stderr
    with torch.no_grad():
        expected = tuned(input_ids=input_ids).logits
    assert torch.equal(load_file(tmp_path / "output.safetensors")["logits"], expected)


def test_merging_by_id_equals_merging_files(hub, checkpoint, tmp_path):
    environment, _ = hub
    result = run(MERGE, environment, tmp_path / "merged")
    assert result.returncode == 0, result.stderr
    merge_checkpoint(checkpoint, tmp_path / "adapter", tmp_path / "expected")
    merged, expected = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("merged", "expected")
    )
    assert merged == expected


def test_exporting_by_id_equals_exporting_files(checkpoint, tmp_path):
    config = LRECConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(load(checkpoint), config).save_pretrained(tmp_path / "adapter")
    export_lora(tmp_path / "adapter", tmp_path / "expected")
    with serve({"user/adapter": tmp_path / "adapter"}) as endpoint:
        result = run(EXPORT, fresh_client(endpoint, tmp_path), tmp_path / "exported")
    assert result.returncode == 0, result.stderr
    exported, expected = tmp_path / "exported", tmp_path / "expected"
    weights = "adapter_model.safetensors"
    assert (exported / weights).read_bytes() == (expected / weights).read_bytes()
    assert PeftConfig.from_pretrained(exported) == PeftConfig.from_pretrained(expected)


def test_a_start_from_a_float_model_by_id_equals_that_from_files(checkpoint, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(tiny_config()).save_pretrained(tmp_path / "float", max_shard_size="40KB")
    model = get_peft_model(load(checkpoint), LRECConfig(task_type="CAUSAL_LM", r=4))
    initialize_lrec_weights(model, tmp_path / "float", "svd")
    model.save_pretrained(tmp_path / "expected")
    with serve({"user/base": checkpoint, "user/float": tmp_path / "float"}) as endpoint:
        result = run(START, fresh_client(endpoint, tmp_path), tmp_path / "adapter")
    assert result.returncode == 0, result.stderr
    adapter, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "expected"))
    assert adapter.keys() == expected.keys()
    for name, tensor in adapter.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)  # threads change the rounding


def test_an_unknown_id_is_named(hub, tmp_path):
    environment, _ = hub
    result = run(MERGE.replace("user/base", "user/absent"), environment, tmp_path / "merged")
    assert result.returncode == 1
    assert "user/absent" in result.stderr.splitlines()[-1] or "RepositoryNotFoundError" in result.stderr
    assert not (tmp_path / "merged").exists()

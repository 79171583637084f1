"""Estimates against the bytes of models that are really there, and against themselves."""

import resource
import sys

import pytest
import torch
from gptq_models import float_llama, load, peak_bytes, tiny_config
from hub_server import Hub, serve
from peft import LoraConfig, get_peft_model
from qft_models import int8_llama
from transformers import (
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    Qwen2Config,
    T5Config,
)

from peft_quant import Int8Weight, LRECConfig, PEQAConfig, QuantizedLion, estimate_memory
from peft_quant.estimate import METHODS, Estimate
from peft_quant.estimate.subject import planned_subject
from peft_quant.gptq import is_packed
from peft_quant.model_config import read_model_config


SIZES = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
LLAMA_7B = LlamaConfig(vocab_size=32000, intermediate_size=11008)
OPTIONS = {"sequence": 64, "group_size": 32}


def held(tensors):
    """Bytes that PyTorch's allocator gives out."""
    return sum(-(-tensor.nbytes // 512) * 512 for tensor in tensors)


def rows(report):
    return {row.what: row.bytes for row in report.rows}


def states_of(optimizer):
    return [tensor for state in optimizer.state.values() for tensor in state.values() if torch.is_tensor(tensor)]


def step(model, optimizer, input_ids):
    """A real one; the gradients' bytes."""
    model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    gradients = held(p.grad for p in model.parameters() if p.grad is not None)
    optimizer.step()
    return gradients


@pytest.mark.parametrize("method", ("peqa", "lrec"))
def test_states_on_packed_weights(method, checkpoint, input_ids):
    model = load(checkpoint, dtype=torch.bfloat16)
    layers = [module for module in model.modules() if is_packed(module)]
    config = {"peqa": PEQAConfig(), "lrec": LRECConfig(r=4)}[method]
    tuned = get_peft_model(model, config)
    adapter = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter, lr=1e-3)
    gradients = step(tuned, optimizer, input_ids)
    found = rows(estimate_memory(checkpoint, method, rank=4, sequence=12, batch=2))
    assert found["weights"] == held(layer.qweight for layer in layers)
    assert found["scales"] == held(t for layer in layers for t in (layer.qzeros, layer.scales, layer.g_idx))
    rest = [p for p in model.parameters() if not p.requires_grad]
    frequencies = [model.model.rotary_emb.inv_freq, model.model.rotary_emb.original_inv_freq]
    assert found["rest of the model"] == held([*rest, *frequencies])
    assert found["adapter"] == held(adapter)
    assert found["gradients"] == gradients
    assert found["optimizer"] == held(states_of(optimizer))


@pytest.mark.parametrize("method", ("qft-stack", "qft-fused"))
def test_states_of_int8(method, input_ids):
    model = int8_llama()
    optimizer = QuantizedLion(model.parameters(), fused=method == "qft-fused")
    model.train()(input_ids=input_ids, labels=input_ids).loss.backward()
    entries = [entry for p in model.parameters() if (entry := optimizer.gradients._entries.get(p)) is not None]
    gradients = [tensor for entry in entries for tensor in (entry.codes, entry.scales)]
    optimizer.step()
    report = estimate_memory(tiny_config(), method, sequence=12, batch=2)
    found = rows(report)
    weights = [p for p in model.parameters() if isinstance(p, Int8Weight)]
    assert found["weights"] == held(w.codes for w in weights)
    assert found["scales"] == held(part for w in weights for name, part in w.parts.items() if name != "codes")
    assert found["optimizer"] == held(states_of(optimizer))
    stack = found.get("gradients", 0)
    # at the peak the last of them can be there in bf16 as well
    assert held(gradients) <= stack <= held(gradients) + model.lm_head.weight.nbytes
    assert {row.what: row.values for row in report.rows}["weights"] == sum(w.numel() for w in weights)
    assert report.parameters == sum(p.numel() for p in model.parameters())


def test_states_of_lora(input_ids):
    model = float_llama().bfloat16()
    layers = [m.weight for name, m in model.named_modules() if name.endswith("_proj")]
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    adapter = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapter)
    gradients = step(tuned, optimizer, input_ids)
    found = rows(estimate_memory(tiny_config(), "lora", rank=4, sequence=12, batch=2))
    assert found["weights"] == held(layers)
    assert (found["adapter"], found["gradients"]) == (held(adapter), gradients)
    assert found["optimizer"] == held(states_of(optimizer))


def test_states_of_qlora():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(512, 256, bias=False, compress_statistics=True, quant_type="nf4").to("cpu")
    state = layer.weight.quant_state
    scales = [state.absmax, state.state2.absmax, state.state2.code, state.offset, state.code]
    config = LlamaConfig(**SIZES, num_hidden_layers=1)
    report = estimate_memory(config, "qlora", sequence=12)
    # q, k, v and o are 256 x 256, the others 256 x 512
    assert rows(report)["weights"] == 5 * held([layer.weight])
    assert abs(rows(report)["scales"] - (3 * held(scales) + 2 * held(scales))) <= 7 * 5 * 512


def test_8_bit_adamw():
    def optimizer(rank, name):
        config = LlamaConfig(**SIZES, num_hidden_layers=1)
        return rows(estimate_memory(config, "lora", rank=rank, sequence=12, optimizer=name))["optimizer"]

    # of q, k, v, o, gate, up and down, each A and B
    shapes = [[(64, 256), (256, 64)]] * 4 + [[(64, 256), (512, 64)]] * 2 + [[(64, 512), (256, 64)]]
    codes = [torch.empty(shape, dtype=torch.uint8) for pair in shapes for shape in pair]
    scales = [torch.empty(code.numel() // 256) for code in codes]
    assert optimizer(64, "adamw8bit") == 2 * held([*codes, *scales])
    # below 4096 values a tensor stays in fp32, as with AdamW, which counts its steps on the GPU
    assert optimizer(4, "adamw") - optimizer(4, "adamw8bit") == 512 * len(codes)


def deep(config_class, layers, **options):
    return config_class(**{**SIZES, "num_hidden_layers": layers, **options})


SMALL = deep(LlamaConfig, 2)
ARCHITECTURES = {
    "llama": deep(LlamaConfig, 9, num_key_value_heads=2),
    "qwen2": deep(Qwen2Config, 8, num_key_value_heads=2),  # with biases
    "gemma2": deep(Gemma2Config, 13, num_key_value_heads=2, head_dim=64),  # layers of two kinds, scores that are kept
    "opt": deep(OPTConfig, 8, ffn_dim=512, word_embed_proj_dim=256),
    "bloom": BloomConfig(vocab_size=1000, hidden_size=256, n_layer=8),
    "gpt2": GPT2Config(vocab_size=1000, n_embd=256, n_layer=8, n_head=4),  # Conv1D
}


@pytest.mark.parametrize(
    ("name", "method", "checkpointing"),
    (
        *(("llama", method, checkpointing) for method in METHODS for checkpointing in (True, False)),
        ("qwen2", "peqa", True),
        ("gemma2", "lrec", True),
        ("opt", "qlora", False),
        ("bloom", "peqa", True),
        ("gpt2", "qft-stack", False),
    ),
)
def test_further_layers_add_what_is_said(name, method, checkpointing):
    """The estimate of some layers is the count of all of them, to the byte; and so is a second count."""
    estimate = Estimate(ARCHITECTURES[name], method, checkpointing=checkpointing, **OPTIONS)
    whole = Estimate(ARCHITECTURES[name], method, checkpointing=checkpointing, **OPTIONS)
    subject, whole._parameters = planned_subject(
        read_config_again(ARCHITECTURES[name]),
        method,
        99,
        bits=4,
        group_size=32,
        rank=16,
        checkpointing=checkpointing,
        optimizer="adamw",
    )
    whole._subjects = [subject]
    assert estimate._further > 0
    whole._further = 0
    assert estimate.report(2) == whole.report(2)
    whole._counted.clear()
    assert estimate.report(2) == whole.report(2)


def read_config_again(config):
    return type(config)(**config.to_dict())


def test_grows_with_what_is_asked_for():
    def peak(**options):
        return estimate_memory(SMALL, "lrec", **{**OPTIONS, **options}).total

    usual = peak()
    assert usual < peak(batch=2) < peak(batch=3)
    assert usual < peak(sequence=128)
    assert usual < peak(rank=32)
    assert usual < peak(bits=8)
    assert usual < peak(group_size=16)
    assert usual < peak(checkpointing=False)
    assert usual > peak(optimizer="adamw8bit")
    assert usual > peak(bits=2)


@pytest.mark.parametrize("checkpointing", (True, False))
@pytest.mark.parametrize("method", ("peqa", "qft-stack"))
def test_the_largest_batch_fits_and_one_more_does_not(method, checkpointing):
    estimate = Estimate(SMALL, method, checkpointing=checkpointing, **OPTIONS)
    for memory in (estimate.peak(1), estimate.peak(2) - 1, 20_000_000, 100_000_000):
        batch = estimate.largest_batch(memory)
        assert estimate.peak(batch) <= memory < estimate.peak(batch + 1)
    assert estimate.largest_batch(estimate.peak(1) - 1) == 0


def test_rows_add_up():
    for method in METHODS:
        report = estimate_memory(SMALL, method, **OPTIONS)
        assert report.total == sum(row.bytes for row in report.rows) - report.apart
        assert all(row.bytes > 0 and row.values > 0 for row in report.rows)
        assert {row.what for row in report.rows if row.state} <= {
            "weights",
            "scales",
            "rest of the model",
            "adapter",
            "gradients",
            "optimizer",
        }


def test_bits_and_groups_are_those_of_the_config(checkpoint):
    estimate = Estimate(checkpoint, "peqa", sequence=12)
    assert (estimate.bits, estimate.group_size) == (4, 32)
    other = Estimate(read_model_config(checkpoint), "peqa", bits=8, group_size=-1, sequence=12)
    assert (other.bits, other.group_size) == (8, -1)
    plain = Estimate(tiny_config(), "lrec", sequence=12)
    assert (plain.bits, plain.group_size) == (4, 128)
    assert (Estimate(checkpoint, "qlora", sequence=12).bits, Estimate(checkpoint, "qft-stack").bits) == (4, 8)


def test_the_config_stays_as_it_is(checkpoint):
    config = read_model_config(checkpoint)
    before = config.to_dict()
    estimate_memory(config, "lrec", sequence=12)
    assert config.to_dict() == before


@pytest.mark.parametrize(
    ("config", "options", "message"),
    (
        (tiny_config(), {"method": "dora"}, "method='dora': use one of peqa, lrec"),
        (tiny_config(), {"optimizer": "sgd"}, "optimizer='sgd': use one of adamw"),
        (tiny_config(), {"bits": 5}, "bits=5: GPTQ layers have 2, 3, 4, 8 bits"),
        (tiny_config(), {"group_size": 0}, "group_size=0: use a number of rows, or -1"),
        (tiny_config(), {"rank": 0}, "rank=0: use a positive number"),
        (tiny_config(), {"batch": 0}, "batch=0: use a positive number"),
        (tiny_config(), {"sequence": 0}, "sequence=0: use a positive number"),
        (tiny_config(intermediate_size=100), {}, "100 out-features: GPTQ packs multiples of 32"),
        (deep(MixtralConfig, 2), {}, "MixtralForCausalLM holds .* as one tensor of 3 dimensions"),
        (T5Config(), {}, "no causal language model for a T5Config"),
        (
            tiny_config(vocab_size=10**30),
            {},
            "transformers cannot make a model of this LlamaConfig .*: mend the config",
        ),
        (tiny_config(num_hidden_layers=0), {}, "num_hidden_layers=0: use a positive number"),
        (
            tiny_config(quantization_config={"quant_method": "gptq", "bits": "4"}),
            {},
            "bits='4', which has to be an integer",
        ),
    ),
)
def test_refuses(config, options, message):
    with pytest.raises(ValueError, match=message):
        estimate_memory(config, **{"method": "peqa", "sequence": 12, **options})


def test_an_unknown_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "nonsense"}')
    with pytest.raises(ValueError, match="nonsense"):
        estimate_memory(tmp_path, "peqa")
    with pytest.raises(OSError, match="nothing"):
        estimate_memory(tmp_path / "nothing", "peqa")


def test_only_the_config_is_downloaded(checkpoint, tmp_path, monkeypatch):
    import huggingface_hub.constants as constants

    hub = Hub(tmp_path / "hub")
    hub.add("user/base", checkpoint)
    with serve(hub) as endpoint:
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        found = estimate_memory("user/base", "peqa", sequence=12)
    assert rows(found) == rows(estimate_memory(checkpoint, "peqa", sequence=12))
    files = {path.name for path in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert files == {"config.json"}
    assert hub.requests


def test_nothing_of_the_model_is_in_memory():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    allocated = peak_bytes(lambda: estimate_memory(LLAMA_7B, "peqa"))
    assert allocated < 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 500e6

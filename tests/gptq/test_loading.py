"""`from_pretrained` of GPTQ checkpoints, and models that were loaded in another way."""

import json

import pytest
import torch
from families import FAMILIES
from gptq_models import load, save_tiny_llama
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPTQConfig
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.quantizer_gptq import GptqHfQuantizer

from peft_quant import (
    InvalidCheckpointError,
    InvalidFileError,
    LRECConfig,
    PEQAConfig,
    convert_to_int8,
    prepare_gptq_for_training,
)
from peft_quant.evaluation.loading import load_model, quantization_of
from peft_quant.gptq.loading import GPTQCheckpointQuantizer
from peft_quant.gptq.source import packed_modules
from peft_quant.registry import replace_quantizer


@pytest.fixture
def stock(monkeypatch):
    """Loads as in a process where peft_quant was not imported before."""

    def load_stock(directory, **options):
        with monkeypatch.context() as patched:
            patched.setitem(AUTO_QUANTIZER_MAPPING, "gptq", GptqHfQuantizer)
            return load(directory, **options)

    return load_stock


@pytest.fixture(params=("Qwen3-MoE", "Llama, quantized head"))
def half_loaded(request, stock, tmp_path):
    family = FAMILIES[request.param]
    family.save(tmp_path / "base")
    return stock(tmp_path / "base")


class TestHalfLoadedModels:
    """What transformers makes of the files by itself has layers with random weights."""

    MESSAGE = r"was not loaded whole: \d+ layers are packed in the files and not in the model"

    @pytest.mark.parametrize("config", (PEQAConfig(task_type="CAUSAL_LM"), LRECConfig(task_type="CAUSAL_LM")))
    def test_do_not_take_an_adapter(self, half_loaded, config):
        before = {name: type(module) for name, module in half_loaded.named_modules()}
        with pytest.raises(InvalidCheckpointError, match=self.MESSAGE):
            get_peft_model(half_loaded, config)
        assert {name: type(module) for name, module in half_loaded.named_modules()} == before

    def test_are_not_prepared(self, half_loaded):
        with pytest.raises(InvalidCheckpointError, match=self.MESSAGE):
            prepare_gptq_for_training(half_loaded)

    def test_are_not_prepared_under_lora(self, half_loaded):
        model = get_peft_model(half_loaded, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        with pytest.raises(InvalidCheckpointError, match=self.MESSAGE):
            prepare_gptq_for_training(model)

    def test_are_not_held_in_int8(self, half_loaded):
        with pytest.raises(InvalidCheckpointError, match=self.MESSAGE):
            convert_to_int8(half_loaded)

    def test_are_known_by_their_hub_id(self, half_loaded, monkeypatch):
        directory = half_loaded.config._name_or_path
        half_loaded.config._name_or_path = "user/model"
        monkeypatch.setattr(
            "peft_quant.gptq.source.try_to_load_from_cache", lambda *_, **__: f"{directory}/config.json"
        )
        with pytest.raises(InvalidCheckpointError, match=self.MESSAGE):
            get_peft_model(half_loaded, PEQAConfig())

    def test_packed_in_the_model_alone(self, stock, tmp_path):
        FAMILIES["Llama"].save(tmp_path / "base")
        file = tmp_path / "base" / "model.safetensors"
        tensors = {name: t for name, t in load_file(file).items() if "v_proj" not in name}
        tensors |= {f"model.layers.{i}.self_attn.v_proj.weight": torch.zeros(32, 64) for i in range(2)}
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(InvalidCheckpointError, match="2 layers are in float in the files and packed in the model"):
            get_peft_model(stock(tmp_path / "base"), PEQAConfig())
        assert not hasattr(load(tmp_path / "base").model.layers[0].self_attn.v_proj, "qweight")

    def test_without_a_quantization_at_all(self, tmp_path):
        FAMILIES["Llama, quantize_config.json"].save(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
        with pytest.raises(InvalidCheckpointError, match=self.MESSAGE):
            get_peft_model(model, PEQAConfig())


class TestModelsThatAreWhole:
    def test_of_stock_transformers(self, stock, checkpoint):
        get_peft_model(stock(checkpoint), PEQAConfig())

    def test_quantized_in_memory(self, tmp_path):
        """Their files hold nothing packed."""
        model = load(save_tiny_llama(tmp_path / "packed"))
        float_model = AutoModelForCausalLM.from_config(model.config)
        del float_model.config.quantization_config
        float_model.save_pretrained(tmp_path / "float")
        model.hf_quantizer.checkpoint_files = ()
        model.config._name_or_path = str(tmp_path / "float")
        recorded = get_peft_model(model, PEQAConfig()).peft_config["default"].base_quantization
        assert recorded["checkpoint"] is None


class TestCastModels:
    @pytest.mark.parametrize("cast", ("bfloat16", "double"))
    @pytest.mark.parametrize(
        "use", (lambda model: get_peft_model(model, PEQAConfig()), prepare_gptq_for_training, convert_to_int8)
    )
    def test_are_refused(self, model, cast, use):
        with pytest.raises(ValueError, match=r"scales of .* are torch\.\w+ in memory and torch\.float16 in"):
            use(getattr(model, cast)())

    def test_scales_have_the_dtype_of_the_files(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        file = directory / "model.safetensors"
        tensors = {name: t.float() * 1.0001 if name.endswith("scales") else t for name, t in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
        with pytest.warns(UserWarning, match="scales of"):
            model = get_peft_model(load(directory), PEQAConfig())
        name = "model.layers.0.self_attn.q_proj"
        assert torch.equal(model.get_submodule(f"base_model.model.{name}").base_scales, tensors[f"{name}.scales"])


class TestRepackedLayers:
    """Kernels that repacked their weights are replaced, by what the files say."""

    @pytest.fixture(params=({}, {"act_order": True}, {"symmetric": False, "group_size": -1}))
    def base(self, request, tmp_path):
        return save_tiny_llama(tmp_path / "base", **request.param)

    @pytest.fixture
    def repacked(self, base, input_ids):
        """Of layers that gptqmodel's CPU kernels repack at their first evaluation, or in the place of such."""
        model = load(base)
        expected = get_peft_model(model, PEQAConfig()).eval()
        repacked = load(base)
        for layer in packed_modules(repacked).values():
            layer.linear_mode = "inference"
            layer.qweight.zero_()
        return repacked, expected

    def test_take_an_adapter(self, repacked, input_ids, caplog):
        model, expected = repacked
        adapted = get_peft_model(model, PEQAConfig()).eval()
        assert "14 layers were packed for inference by TorchLinear" in caplog.text
        for (name, buffer), (_, other) in zip(expected.named_buffers(), adapted.named_buffers()):
            assert torch.equal(buffer, other), name
        assert torch.equal(adapted(input_ids).logits, expected(input_ids).logits)

    def test_are_prepared_and_held_in_int8(self, repacked, input_ids):
        model, expected = repacked
        prepare_gptq_for_training(model)
        torch.testing.assert_close(model(input_ids).logits, expected(input_ids).logits)
        for layer in packed_modules(model).values():
            layer.linear_mode = "inference"
        assert not packed_modules(convert_to_int8(model))

    def test_of_a_cpu_kernel(self, checkpoint, input_ids):
        model = load(checkpoint, backend="auto")
        model(input_ids)
        adapted = get_peft_model(model, PEQAConfig()).eval()
        expected = get_peft_model(load(checkpoint), PEQAConfig()).eval()
        assert torch.equal(adapted(input_ids).logits, expected(input_ids).logits)


class TestWhatTheFilesSay:
    def test_bits_and_groups_of_each_layer(self, tmp_path):
        FAMILIES["Llama, mixed bits"].save(tmp_path / "base")
        layer = load(tmp_path / "base").model.layers[0]
        assert (layer.mlp.down_proj.bits, layer.mlp.up_proj.bits, layer.mlp.gate_proj.bits) == (8, 3, 4)
        assert layer.self_attn.v_proj.weight.dtype == torch.float32

    def test_another_group_size_than_declared(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base", group_size=32)
        file = directory / "config.json"
        config = json.loads(file.read_text())
        config["quantization_config"]["group_size"] = 128
        file.write_text(json.dumps(config))
        model = get_peft_model(load(directory), PEQAConfig())
        assert model.peft_config["default"].base_quantization["group_size"] == 32

    def test_files_of_another_model_than_the_config(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "intermediate_size": 160}))
        with pytest.raises(InvalidCheckpointError, match="the files are of another model"):
            load(directory)

    @pytest.mark.parametrize(("part", "message"), (("qweight", "are of another model"), ("scales", "has no groups")))
    def test_tensors_of_other_shapes(self, tmp_path, part, message):
        directory = save_tiny_llama(tmp_path / "base")
        name = f"model.layers.0.mlp.up_proj.{part}"
        tensors = load_file(directory / "model.safetensors")
        tensors[name] = tensors[name][:0] if part == "scales" else tensors[name].flatten()
        save_file(tensors, directory / "model.safetensors", {"format": "pt"})
        with pytest.raises(InvalidCheckpointError, match=message):
            load(directory)

    def test_links_that_leave_the_directory(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        (directory / "model.safetensors").rename(tmp_path / "elsewhere")
        (directory / "model.safetensors").symlink_to(tmp_path / "elsewhere")
        with pytest.raises(InvalidFileError, match=r"model\.safetensors is a link to .*elsewhere"):
            load(directory)

    def test_a_layer_that_the_model_has_no_place_for(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "num_hidden_layers": 1}))
        with pytest.raises(InvalidCheckpointError, match=r"for 7 of them, model\.layers\.1.* no linear layer"):
            load(directory)

    def test_act_order_without_an_order(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base", act_order=True)
        FAMILIES["Llama, no g_idx"].edit(directory)
        with pytest.raises(InvalidCheckpointError, match="has no g_idx, and the quantization config says desc_act"):
            load(directory)

    def test_no_config_but_the_callers(self, tmp_path):
        directory = save_tiny_llama(tmp_path / "base")
        expected = load(directory)
        file = directory / "config.json"
        config = json.loads(file.read_text())
        del config["quantization_config"]
        file.write_text(json.dumps(config))
        model = AutoModelForCausalLM.from_pretrained(
            directory, quantization_config=GPTQConfig(bits=4, group_size=32, backend="gptq_torch")
        )
        for name, layer in packed_modules(expected).items():
            assert torch.equal(packed_modules(model)[name].qzeros, layer.qzeros)

    def test_the_command_line_loads_what_quantize_config_declares(self, tmp_path):
        FAMILIES["Llama, quantize_config.json"].save(tmp_path / "base")
        assert quantization_of(tmp_path / "base") == "gptq"
        assert len(packed_modules(load_model(tmp_path / "base"))) == 14


def test_a_quantizer_of_another_package_stays(monkeypatch):
    class Other(GptqHfQuantizer):
        pass

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", Other)
    replace_quantizer("gptq", GPTQCheckpointQuantizer)
    assert AUTO_QUANTIZER_MAPPING["gptq"] is Other
